"""make bench: the agent beside an echo server, postfwd and policyd-rate-limit, on one machine, in one run.

    python -m tests.bench [--quick] [--markdown] [--rounds N] [--seconds S] [--only PART ...]

It shows first that every server limits at all, then lets each answer the same load in turn, round after round, and
compares within a round: what else the machine does meets all of them alike. Figures are medians over the rounds.

    load.c, echo.c   the load generator and the echo server, which parses nothing and decides nothing
    load.py          builds the two and runs the generator
    servers.py       starts the servers with equivalent limits, reads what they cost, stops them
    compare.py       requests a second, latency, CPU and memory side by side
    meters.py        memory per live meter, and latency with a million of them
    decision.py      the decision alone, without sockets
    report.py        targets, table, Markdown, build/bench.json

Targets are printed beside the figures and never asserted: the test (test_bench.py) asserts that the bench works.
"""
