from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Meter(_message.Message):
    __slots__ = ("limit", "key", "count", "window_ms", "used", "assumed", "max", "left")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_MS_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    ASSUMED_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    limit: str
    key: bytes
    count: str
    window_ms: int
    used: int
    assumed: int
    max: int
    left: int
    def __init__(self, limit: _Optional[str] = ..., key: _Optional[bytes] = ..., count: _Optional[str] = ..., window_ms: _Optional[int] = ..., used: _Optional[int] = ..., assumed: _Optional[int] = ..., max: _Optional[int] = ..., left: _Optional[int] = ...) -> None: ...

class AskRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    def __init__(self, request: _Optional[bytes] = ...) -> None: ...

class AskResponse(_message.Message):
    __slots__ = ("action", "refused", "limits", "troubles")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    TROUBLES_FIELD_NUMBER: _ClassVar[int]
    action: str
    refused: bool
    limits: _containers.RepeatedCompositeFieldContainer[Explanation]
    troubles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, action: _Optional[str] = ..., refused: _Optional[bool] = ..., limits: _Optional[_Iterable[_Union[Explanation, _Mapping]]] = ..., troubles: _Optional[_Iterable[str]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("limit", "why_not", "shadow", "readings")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    WHY_NOT_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    READINGS_FIELD_NUMBER: _ClassVar[int]
    limit: str
    why_not: str
    shadow: bool
    readings: _containers.RepeatedCompositeFieldContainer[Reading]
    def __init__(self, limit: _Optional[str] = ..., why_not: _Optional[str] = ..., shadow: _Optional[bool] = ..., readings: _Optional[_Iterable[_Union[Reading, _Mapping]]] = ...) -> None: ...

class Reading(_message.Message):
    __slots__ = ("meter", "amount", "wait_ms")
    METER_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    meter: Meter
    amount: int
    wait_ms: int
    def __init__(self, meter: _Optional[_Union[Meter, _Mapping]] = ..., amount: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class ShowRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...

class ShowResponse(_message.Message):
    __slots__ = ("usages", "nearest")
    USAGES_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    usages: _containers.RepeatedCompositeFieldContainer[Usage]
    nearest: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, usages: _Optional[_Iterable[_Union[Usage, _Mapping]]] = ..., nearest: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("meter", "slice_ms", "slices")
    METER_FIELD_NUMBER: _ClassVar[int]
    SLICE_MS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    meter: Meter
    slice_ms: int
    slices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, meter: _Optional[_Union[Meter, _Mapping]] = ..., slice_ms: _Optional[int] = ..., slices: _Optional[_Iterable[int]] = ...) -> None: ...

class TopRequest(_message.Message):
    __slots__ = ("limit", "keys")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    limit: str
    keys: int
    def __init__(self, limit: _Optional[str] = ..., keys: _Optional[int] = ...) -> None: ...

class TopResponse(_message.Message):
    __slots__ = ("rankings",)
    RANKINGS_FIELD_NUMBER: _ClassVar[int]
    rankings: _containers.RepeatedCompositeFieldContainer[Ranking]
    def __init__(self, rankings: _Optional[_Iterable[_Union[Ranking, _Mapping]]] = ...) -> None: ...

class Ranking(_message.Message):
    __slots__ = ("limit", "count", "window_ms", "meters")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_MS_FIELD_NUMBER: _ClassVar[int]
    METERS_FIELD_NUMBER: _ClassVar[int]
    limit: str
    count: str
    window_ms: int
    meters: _containers.RepeatedCompositeFieldContainer[Meter]
    def __init__(self, limit: _Optional[str] = ..., count: _Optional[str] = ..., window_ms: _Optional[int] = ..., meters: _Optional[_Iterable[_Union[Meter, _Mapping]]] = ...) -> None: ...

class ResetRequest(_message.Message):
    __slots__ = ("key", "limit")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    limit: str
    def __init__(self, key: _Optional[bytes] = ..., limit: _Optional[str] = ...) -> None: ...

class ResetResponse(_message.Message):
    __slots__ = ("forgotten", "nearest")
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    forgotten: _containers.RepeatedCompositeFieldContainer[Forgotten]
    nearest: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, forgotten: _Optional[_Iterable[_Union[Forgotten, _Mapping]]] = ..., nearest: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Forgotten(_message.Message):
    __slots__ = ("limit", "key", "count", "window_ms", "used")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_MS_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    limit: str
    key: bytes
    count: str
    window_ms: int
    used: int
    def __init__(self, limit: _Optional[str] = ..., key: _Optional[bytes] = ..., count: _Optional[str] = ..., window_ms: _Optional[int] = ..., used: _Optional[int] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("problems", "limits")
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    problems: _containers.RepeatedScalarFieldContainer[str]
    limits: int
    def __init__(self, problems: _Optional[_Iterable[str]] = ..., limits: _Optional[int] = ...) -> None: ...
