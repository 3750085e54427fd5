{%- from "postmeter/map.jinja" import postmeter, place with context %}
---
{%- if not postmeter.version %}
postmeter-package-install-version-missing:
  test.fail_without_changes:
    - name: "postmeter:version is missing in the pillar; name the release"
    - failhard: true
{%- endif %}

{%- if postmeter.venv_package %}
postmeter-package-install-venv:
  pkg.installed:
    - name: {{ postmeter.venv_package }}
{%- endif %}

postmeter-package-install-group:
  group.present:
    - name: postmeter
    - system: true
    - addusers: {{ postmeter.admins | json }}

postmeter-package-install-user:
  user.present:
    - name: postmeter
    - gid: postmeter
    - system: true
    - home: /var/lib/postmeter
    - createhome: false
    - shell: /usr/sbin/nologin
    - require:
      - group: postmeter-package-install-group

postmeter-package-install-directory:
  file.directory:
    - name: /opt/postmeter
    - mode: "0755"

{%- if postmeter.wheelhouse %}
postmeter-package-install-wheels:
  file.recurse:
    - name: {{ place }}.wheels
    - source: {{ postmeter.wheelhouse }}
    - unless: test -e {{ place }}/installed
    - require:
      - file: postmeter-package-install-directory
    - require_in:
      - cmd: postmeter-package-install-release
{%- endif %}

postmeter-package-install-release:
  cmd.run:
    - name: |
        set -eu
        {{ postmeter.python }} -m venv --clear {{ place }}
        {{ place }}/bin/pip install --quiet --no-input --disable-pip-version-check \
            {{ "--no-index --find-links " ~ place ~ ".wheels" if postmeter.wheelhouse else "" }} \
            {{ postmeter.pip_arguments | join(" ") }} postmeter=={{ postmeter.version }}
        {{ place }}/bin/python -c "import postmeter.agent"
        rm -rf {{ place }}.wheels
        touch {{ place }}/installed
    - creates: {{ place }}/installed
    - umask: "022"
    - require:
      - file: postmeter-package-install-directory
