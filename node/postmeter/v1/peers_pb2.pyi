from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Packet(_message.Message):
    __slots__ = ("sender", "receiver", "incarnation", "protocol_oldest", "protocol_newest", "version", "wall_ms", "tables", "messages", "digest", "portions", "more")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_OLDEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_NEWEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WALL_MS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PORTIONS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    sender: str
    receiver: str
    incarnation: int
    protocol_oldest: int
    protocol_newest: int
    version: str
    wall_ms: int
    tables: Tables
    messages: _containers.RepeatedCompositeFieldContainer[RightsMessage]
    digest: Digest
    portions: _containers.RepeatedCompositeFieldContainer[Portion]
    more: bool
    def __init__(self, sender: _Optional[str] = ..., receiver: _Optional[str] = ..., incarnation: _Optional[int] = ..., protocol_oldest: _Optional[int] = ..., protocol_newest: _Optional[int] = ..., version: _Optional[str] = ..., wall_ms: _Optional[int] = ..., tables: _Optional[_Union[Tables, _Mapping]] = ..., messages: _Optional[_Iterable[_Union[RightsMessage, _Mapping]]] = ..., digest: _Optional[_Union[Digest, _Mapping]] = ..., portions: _Optional[_Iterable[_Union[Portion, _Mapping]]] = ..., more: _Optional[bool] = ...) -> None: ...

class WrittenPortions(_message.Message):
    __slots__ = ("portions",)
    PORTIONS_FIELD_NUMBER: _ClassVar[int]
    portions: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, portions: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Tables(_message.Message):
    __slots__ = ("nodes", "meters", "keys")
    NODES_FIELD_NUMBER: _ClassVar[int]
    METERS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedScalarFieldContainer[str]
    meters: _containers.RepeatedCompositeFieldContainer[MetersId]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, nodes: _Optional[_Iterable[str]] = ..., meters: _Optional[_Iterable[_Union[MetersId, _Mapping]]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class MetersId(_message.Message):
    __slots__ = ("limit", "key", "count", "window_ms")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_MS_FIELD_NUMBER: _ClassVar[int]
    limit: str
    key: str
    count: str
    window_ms: int
    def __init__(self, limit: _Optional[str] = ..., key: _Optional[str] = ..., count: _Optional[str] = ..., window_ms: _Optional[int] = ...) -> None: ...

class RightsMessage(_message.Message):
    __slots__ = ("ask", "answer", "offer", "back", "returned", "handover", "accepted")
    ASK_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    BACK_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ask: Ask
    answer: Answer
    offer: Offer
    back: Return
    returned: Returned
    handover: Handover
    accepted: Accepted
    def __init__(self, ask: _Optional[_Union[Ask, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., back: _Optional[_Union[Return, _Mapping]] = ..., returned: _Optional[_Union[Returned, _Mapping]] = ..., handover: _Optional[_Union[Handover, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ...) -> None: ...

class LoanId(_message.Message):
    __slots__ = ("borrower", "incarnation", "number")
    BORROWER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    borrower: int
    incarnation: int
    number: int
    def __init__(self, borrower: _Optional[int] = ..., incarnation: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("loan", "meters", "key", "amount", "urgent", "asked_ms", "lifetime_ms", "instead")
    LOAN_FIELD_NUMBER: _ClassVar[int]
    METERS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    URGENT_FIELD_NUMBER: _ClassVar[int]
    ASKED_MS_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_MS_FIELD_NUMBER: _ClassVar[int]
    INSTEAD_FIELD_NUMBER: _ClassVar[int]
    loan: LoanId
    meters: int
    key: int
    amount: int
    urgent: bool
    asked_ms: int
    lifetime_ms: int
    instead: _containers.RepeatedCompositeFieldContainer[LoanId]
    def __init__(self, loan: _Optional[_Union[LoanId, _Mapping]] = ..., meters: _Optional[int] = ..., key: _Optional[int] = ..., amount: _Optional[int] = ..., urgent: _Optional[bool] = ..., asked_ms: _Optional[int] = ..., lifetime_ms: _Optional[int] = ..., instead: _Optional[_Iterable[_Union[LoanId, _Mapping]]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("loan", "amount", "asked_ms", "wait_ms", "again")
    LOAN_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    ASKED_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    loan: LoanId
    amount: int
    asked_ms: int
    wait_ms: int
    again: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, loan: _Optional[_Union[LoanId, _Mapping]] = ..., amount: _Optional[int] = ..., asked_ms: _Optional[int] = ..., wait_ms: _Optional[int] = ..., again: _Optional[_Iterable[int]] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("meters", "key")
    METERS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    meters: int
    key: int
    def __init__(self, meters: _Optional[int] = ..., key: _Optional[int] = ...) -> None: ...

class Return(_message.Message):
    __slots__ = ("loan", "returned")
    LOAN_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    loan: LoanId
    returned: int
    def __init__(self, loan: _Optional[_Union[LoanId, _Mapping]] = ..., returned: _Optional[int] = ...) -> None: ...

class Returned(_message.Message):
    __slots__ = ("loan", "returned")
    LOAN_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    loan: LoanId
    returned: int
    def __init__(self, loan: _Optional[_Union[LoanId, _Mapping]] = ..., returned: _Optional[int] = ...) -> None: ...

class Handover(_message.Message):
    __slots__ = ("generation", "unclean_ms", "part", "parts", "borrowers", "incarnations", "numbers", "meters", "keys", "amounts")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    UNCLEAN_MS_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    BORROWERS_FIELD_NUMBER: _ClassVar[int]
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    METERS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    AMOUNTS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    unclean_ms: int
    part: int
    parts: int
    borrowers: _containers.RepeatedScalarFieldContainer[int]
    incarnations: _containers.RepeatedScalarFieldContainer[int]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    meters: _containers.RepeatedScalarFieldContainer[int]
    keys: _containers.RepeatedScalarFieldContainer[int]
    amounts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, generation: _Optional[int] = ..., unclean_ms: _Optional[int] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ..., borrowers: _Optional[_Iterable[int]] = ..., incarnations: _Optional[_Iterable[int]] = ..., numbers: _Optional[_Iterable[int]] = ..., meters: _Optional[_Iterable[int]] = ..., keys: _Optional[_Iterable[int]] = ..., amounts: _Optional[_Iterable[int]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class Digest(_message.Message):
    __slots__ = ("nodes", "incarnations", "versions", "ages_ms")
    NODES_FIELD_NUMBER: _ClassVar[int]
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    AGES_MS_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedScalarFieldContainer[str]
    incarnations: _containers.RepeatedScalarFieldContainer[int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    ages_ms: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, nodes: _Optional[_Iterable[str]] = ..., incarnations: _Optional[_Iterable[int]] = ..., versions: _Optional[_Iterable[int]] = ..., ages_ms: _Optional[_Iterable[int]] = ...) -> None: ...

class Portion(_message.Message):
    __slots__ = ("node", "incarnation", "since", "version", "now_ms", "tables", "versions", "meters", "slices", "keys", "amounts")
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NOW_MS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    METERS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    AMOUNTS_FIELD_NUMBER: _ClassVar[int]
    node: str
    incarnation: int
    since: int
    version: int
    now_ms: int
    tables: Tables
    versions: _containers.RepeatedScalarFieldContainer[int]
    meters: _containers.RepeatedScalarFieldContainer[int]
    slices: _containers.RepeatedScalarFieldContainer[int]
    keys: _containers.RepeatedScalarFieldContainer[int]
    amounts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, node: _Optional[str] = ..., incarnation: _Optional[int] = ..., since: _Optional[int] = ..., version: _Optional[int] = ..., now_ms: _Optional[int] = ..., tables: _Optional[_Union[Tables, _Mapping]] = ..., versions: _Optional[_Iterable[int]] = ..., meters: _Optional[_Iterable[int]] = ..., slices: _Optional[_Iterable[int]] = ..., keys: _Optional[_Iterable[int]] = ..., amounts: _Optional[_Iterable[int]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("tables", "lent", "standing", "handover", "before", "borrowed")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    BORROWED_FIELD_NUMBER: _ClassVar[int]
    tables: Tables
    lent: Lent
    standing: Standing
    handover: Handover
    before: Before
    borrowed: Borrowed
    def __init__(self, tables: _Optional[_Union[Tables, _Mapping]] = ..., lent: _Optional[_Union[Lent, _Mapping]] = ..., standing: _Optional[_Union[Standing, _Mapping]] = ..., handover: _Optional[_Union[Handover, _Mapping]] = ..., before: _Optional[_Union[Before, _Mapping]] = ..., borrowed: _Optional[_Union[Borrowed, _Mapping]] = ...) -> None: ...

class Lent(_message.Message):
    __slots__ = ("loan", "meters", "key", "amount", "back_ms", "returned")
    LOAN_FIELD_NUMBER: _ClassVar[int]
    METERS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    BACK_MS_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    loan: LoanId
    meters: int
    key: int
    amount: int
    back_ms: int
    returned: int
    def __init__(self, loan: _Optional[_Union[LoanId, _Mapping]] = ..., meters: _Optional[int] = ..., key: _Optional[int] = ..., amount: _Optional[int] = ..., back_ms: _Optional[int] = ..., returned: _Optional[int] = ...) -> None: ...

class Borrowed(_message.Message):
    __slots__ = ("meters", "key", "lender", "amount", "asked_ms", "lifetime_ms", "returned", "acknowledged", "generation", "accepted", "covers")
    class CoversEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    METERS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    LENDER_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    ASKED_MS_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_MS_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    COVERS_FIELD_NUMBER: _ClassVar[int]
    meters: int
    key: int
    lender: str
    amount: int
    asked_ms: int
    lifetime_ms: int
    returned: int
    acknowledged: int
    generation: int
    accepted: bool
    covers: _containers.ScalarMap[int, int]
    def __init__(self, meters: _Optional[int] = ..., key: _Optional[int] = ..., lender: _Optional[str] = ..., amount: _Optional[int] = ..., asked_ms: _Optional[int] = ..., lifetime_ms: _Optional[int] = ..., returned: _Optional[int] = ..., acknowledged: _Optional[int] = ..., generation: _Optional[int] = ..., accepted: _Optional[bool] = ..., covers: _Optional[_Mapping[int, int]] = ...) -> None: ...

class Standing(_message.Message):
    __slots__ = ("node", "generations", "born", "handed", "stopped", "lingers", "unclean_ms")
    NODE_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    BORN_FIELD_NUMBER: _ClassVar[int]
    HANDED_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    LINGERS_FIELD_NUMBER: _ClassVar[int]
    UNCLEAN_MS_FIELD_NUMBER: _ClassVar[int]
    node: str
    generations: _containers.RepeatedCompositeFieldContainer[Generation]
    born: int
    handed: _containers.RepeatedCompositeFieldContainer[NodeNumber]
    stopped: _containers.RepeatedCompositeFieldContainer[NodeNumber]
    lingers: _containers.RepeatedCompositeFieldContainer[NodeNumber]
    unclean_ms: int
    def __init__(self, node: _Optional[str] = ..., generations: _Optional[_Iterable[_Union[Generation, _Mapping]]] = ..., born: _Optional[int] = ..., handed: _Optional[_Iterable[_Union[NodeNumber, _Mapping]]] = ..., stopped: _Optional[_Iterable[_Union[NodeNumber, _Mapping]]] = ..., lingers: _Optional[_Iterable[_Union[NodeNumber, _Mapping]]] = ..., unclean_ms: _Optional[int] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("number", "members")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    number: int
    members: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, number: _Optional[int] = ..., members: _Optional[_Iterable[str]] = ...) -> None: ...

class NodeNumber(_message.Message):
    __slots__ = ("node", "number")
    NODE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    node: str
    number: int
    def __init__(self, node: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class Before(_message.Message):
    __slots__ = ("meters", "until_ms", "max", "key")
    METERS_FIELD_NUMBER: _ClassVar[int]
    UNTIL_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    meters: int
    until_ms: int
    max: int
    key: int
    def __init__(self, meters: _Optional[int] = ..., until_ms: _Optional[int] = ..., max: _Optional[int] = ..., key: _Optional[int] = ...) -> None: ...
