from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Meter(_message.Message):
    __slots__ = ("limit", "key", "count", "window_ms", "used", "assumed", "max", "left", "share")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_MS_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    ASSUMED_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    limit: str
    key: bytes
    count: str
    window_ms: int
    used: int
    assumed: int
    max: int
    left: int
    share: Share
    def __init__(self, limit: _Optional[str] = ..., key: _Optional[bytes] = ..., count: _Optional[str] = ..., window_ms: _Optional[int] = ..., used: _Optional[int] = ..., assumed: _Optional[int] = ..., max: _Optional[int] = ..., left: _Optional[int] = ..., share: _Optional[_Union[Share, _Mapping]] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("base", "lent", "borrowed", "used", "left")
    BASE_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    BORROWED_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    base: int
    lent: int
    borrowed: int
    used: int
    left: int
    def __init__(self, base: _Optional[int] = ..., lent: _Optional[int] = ..., borrowed: _Optional[int] = ..., used: _Optional[int] = ..., left: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("node", "used", "age_ms")
    NODE_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    node: str
    used: int
    age_ms: int
    def __init__(self, node: _Optional[str] = ..., used: _Optional[int] = ..., age_ms: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("meter", "amount", "wait_ms", "borrows")
    METER_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    BORROWS_FIELD_NUMBER: _ClassVar[int]
    meter: Meter
    amount: int
    wait_ms: int
    borrows: bool
    def __init__(self, meter: _Optional[_Union[Meter, _Mapping]] = ..., amount: _Optional[int] = ..., wait_ms: _Optional[int] = ..., borrows: _Optional[bool] = ...) -> None: ...

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
    __slots__ = ("meter", "slice_ms", "slices", "parts")
    METER_FIELD_NUMBER: _ClassVar[int]
    SLICE_MS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    meter: Meter
    slice_ms: int
    slices: _containers.RepeatedScalarFieldContainer[int]
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, meter: _Optional[_Union[Meter, _Mapping]] = ..., slice_ms: _Optional[int] = ..., slices: _Optional[_Iterable[int]] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

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

class NodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodesResponse(_message.Message):
    __slots__ = ("nodes", "generation", "last", "revision")
    NODES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    generation: int
    last: str
    revision: int
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., generation: _Optional[int] = ..., last: _Optional[str] = ..., revision: _Optional[int] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("id", "state", "self", "alive", "address", "version", "generation", "revision", "refused", "lent_percent", "borrowed_percent", "reached_ms", "ahead_ms", "troubles", "awaits", "changing")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SELF_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LENT_PERCENT_FIELD_NUMBER: _ClassVar[int]
    BORROWED_PERCENT_FIELD_NUMBER: _ClassVar[int]
    REACHED_MS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_MS_FIELD_NUMBER: _ClassVar[int]
    TROUBLES_FIELD_NUMBER: _ClassVar[int]
    AWAITS_FIELD_NUMBER: _ClassVar[int]
    CHANGING_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: str
    self: bool
    alive: bool
    address: str
    version: str
    generation: int
    revision: int
    refused: int
    lent_percent: float
    borrowed_percent: float
    reached_ms: int
    ahead_ms: int
    troubles: _containers.RepeatedScalarFieldContainer[str]
    awaits: _containers.RepeatedScalarFieldContainer[str]
    changing: bool
    def __init__(self_, id: _Optional[str] = ..., state: _Optional[str] = ..., self: _Optional[bool] = ..., alive: _Optional[bool] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., generation: _Optional[int] = ..., revision: _Optional[int] = ..., refused: _Optional[int] = ..., lent_percent: _Optional[float] = ..., borrowed_percent: _Optional[float] = ..., reached_ms: _Optional[int] = ..., ahead_ms: _Optional[int] = ..., troubles: _Optional[_Iterable[str]] = ..., awaits: _Optional[_Iterable[str]] = ..., changing: _Optional[bool] = ...) -> None: ...

class ChangeRosterRequest(_message.Message):
    __slots__ = ("change", "node")
    class Change(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CHANGE_UNSPECIFIED: _ClassVar[ChangeRosterRequest.Change]
        CHANGE_JOIN: _ClassVar[ChangeRosterRequest.Change]
        CHANGE_DRAIN: _ClassVar[ChangeRosterRequest.Change]
        CHANGE_REMOVE: _ClassVar[ChangeRosterRequest.Change]
    CHANGE_UNSPECIFIED: ChangeRosterRequest.Change
    CHANGE_JOIN: ChangeRosterRequest.Change
    CHANGE_DRAIN: ChangeRosterRequest.Change
    CHANGE_REMOVE: ChangeRosterRequest.Change
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    change: ChangeRosterRequest.Change
    node: str
    def __init__(self, change: _Optional[_Union[ChangeRosterRequest.Change, str]] = ..., node: _Optional[str] = ...) -> None: ...

class ChangeRosterResponse(_message.Message):
    __slots__ = ("done",)
    DONE_FIELD_NUMBER: _ClassVar[int]
    done: str
    def __init__(self, done: _Optional[str] = ...) -> None: ...
