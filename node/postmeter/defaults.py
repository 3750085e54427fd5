"""Every number that someone may want to change, with the reason for it. Units stand last in the name.

What an operator may set is in settings.py; these are the limits of what comes from outside, and the paces of the agent.
"""

# --- what a client of the policy port may send --------------------------------------------------------------------
# Postfix compiles its own cap on attribute strings out. Its line_length_limit is 2,048; certificate subjects may be
# longer, and 29 to 33 attributes of which a few are long stay far below these.
LINE_CHARS_MAX = 4096
ATTRIBUTES_MAX = 100
REQUEST_BYTES_MAX = 32 * 1024
# smtpd's default process limit is 100 a service, large sites run some thousands; a cap below the number of smtpd
# processes stalls mail.
CONNECTIONS_MAX = 10_000
LISTEN_BACKLOG = 4096
# A key longer than this is cut from a hostile client: RFC 5321 allows 254 characters of address.
KEY_CHARS_MAX = 512
# smtpd puts the reply's text into an SMTP line of at most 512 bytes.
REPLY_CHARS_MAX = 400

# --- meters ---------------------------------------------------------------------------------------------------------
SLICES_PER_WINDOW = 60
WINDOW_MS_MIN = 1_000
WINDOW_MS_MAX = 400 * 86_400_000
# About 130 to 250 bytes a meter: a million keys stay below 350 MB.
KEYS_MAX = 1_000_000
# Admissions that may be answered before they are on disk, as a part of `max`; a crash costs as much for one window.
UNFLUSHED_PART = 20
# Expired entries are subtracted in portions, so that no request waits for a large slice to be forgotten.
EXPIRE_ENTRIES_MAX = 500
EXPIRE_PAUSE_S = 0.005
TIDY_INTERVAL_S = 1.0
# Charged requests are remembered, so that Postfix's repeat after a lost reply is not charged twice: the last two of
# each of so many groups, a power of two. At 1,000 messages a second, 94 % are for smtpd's timeout of 100 s. 4 MB.
REPEAT_PAIRS = 1 << 18

# --- rights of a cluster ----------------------------------------------------------------------------------------------
# A quarter of `max` is dealt in chunks, so that who needs much among many nodes has few to ask: up to 7 nodes all have
# the same; of 200 among 100 nodes, two have 26 and all others 1 or 2. Every node must deal alike: never change
# these. More in chunks is good for senders who stay with one node, less for those who roam.
SHARE_CHUNK_NODES_MIN = 8
SHARE_CHUNK_MAX = 25
SHARE_SINGLES = 3
# How long a borrower may spend: this, or a part of a longer window. The lender waits for a window more, so shorter
# loans would not come back much sooner, and would have to be asked for more often.
LOAN_MS = 15 * 60_000
LOAN_WINDOW_PART = 4
# In one go, a fiftieth of a second after the one before: Postfix waits meanwhile.
BOOKS_TENDED_MAX = 200
# What is needed for one message is used within milliseconds, and its owner has it back as soon as it leaves the window.
LOAN_NOW_MS = 5_000
# Who sends from the same node again and again gets this part of `max` beyond what it needs, so that it asks seldom.
LOAN_MORE_PART = 16
LOAN_MORE_USED_MIN = 2
# Loans that become one in one question.
MERGED_MAX = 100
# Crystals are right to 0.01 %, virtual machines may be off by more while they migrate.
CLOCK_DRIFT_PPM = 1_000
WAIT_MARGIN_MS = 1_000
# A search that brought nothing is not repeated before a peer expects to have something, but never sooner or later than:
SEEK_PAUSE_MS_MIN = 20
SEEK_PAUSE_MS_MAX = 2_000
# Answers that have not come after this are not waited for any longer: the next peers are asked.
SEEK_WAVE_MS = 60
# How often nodes that may have got something are asked again.
SEEK_ROUNDS_MAX = 3
# How many are asked at last, though nobody is known to have anything. To ask all of 100 was most of what they said.
SEEK_SWEEP_MAX = 16
# What is left of a loan is given back when it is over, and again until that is acknowledged, at moments that lie so
# many to a lifetime: whatever is due for a peer then goes in one message.
LOAN_LOOKS = 8
# Handovers that are not acknowledged are repeated.
HANDOVER_REPEAT_MS = 500
# Beyond these nothing is lent or asked for, which is always safe. A book and its loans are about 1 kB.
BOOKS_MAX = 200_000
LOANS_MAX = 1_000_000
QUESTIONS_MAX = 100_000

# --- the usage view -------------------------------------------------------------------------------------------------
# What a portion of gossip holds at most. Every node keeps to it, so never lower it.
VIEW_PORTION_ENTRIES_MAX = 200
# What a node puts into one, unless it is a single change: taken in within 0.2 ms, and Postfix is answered after each.
VIEW_PORTION_ENTRIES = 50
# So many of those that were told last are kept as they were written, for so long: 4 kB each, and all peers are told the
# same within some seconds.
VIEW_TOLD_MAX = 1_000
VIEW_TOLD_MS = 5_000
# What others used, per (node, meter, slice): about 280 bytes each with its key.
VIEW_ENTRIES_MAX = 1_000_000
VIEW_METERS_MAX = 10_000
VIEW_NODES_MAX = 1_000
# A node of which nothing is heard is remembered so long: far longer than a message can be under way.
VIEW_KEEP_MS = 600_000
# What a node has lent or borrowed is forgotten by the others so long after it said so, and said again in half of that:
# an entry every five minutes for a loan that lasts, and little left of a node that died.
VIEW_LOANS_MS = 600_000

# --- peers ------------------------------------------------------------------------------------------------------------
# How long Postfix may wait for rights: four round trips within a data centre are 2 ms, between continents 600 ms.
BORROW_TIMEOUT_MS = 250
BORROW_TIMEOUT_MS_MAX = 5_000
# Figures of other nodes are a second or two old: all agree 0.4 s after the last change in a cluster of 5, 0.6 s in one
# of 10, 1.8 s in one of 100. With 8 peers 0.4, 0.4 and 0.8 s, for three times as many digests (24 kB/s at 100 nodes).
EXCHANGE_INTERVAL_MS = 1_000
EXCHANGE_INTERVAL_MS_MIN = 100
EXCHANGE_INTERVAL_MS_MAX = 60_000
EXCHANGE_PEERS = 3
EXCHANGE_PEERS_MAX = 64
# A packet is filled up to here; what makes it full may be a portion of 400 kB, if all keys in it are long.
PACKET_BYTES = 32 * 1024
# More than that is not received. Together with the number of calls, what a peer can make this node hold.
PACKET_BYTES_MAX = 512 * 1024
# So many messages are read in 0.5 ms. Every node keeps to it, so never lower it; the same for the parts of handovers.
PACKET_MESSAGES_MAX = 100
HANDOVER_PART_LOANS_MAX = 200
HANDOVER_PARTS_MAX = 20_000
# A part whose keys are longer than this altogether ends there.
HANDOVER_PART_CHARS = 16 * 1024
# Names have 64 characters, keys of limits may have some parts.
METERS_NAME_CHARS_MAX = 1_000
# A call that waits for a lender's disk takes 0.1 s; longer than this nobody waits for rights.
PEER_CALL_TIMEOUT_S = 2.0
# Messages to one peer: calls under way, and what is not yet sent (100 in each call, so a second's worth and more).
PEER_CALLS_MAX = 8
PEER_QUEUE_MAX = 10_000
# While a call is under way others gather so long: 500 calls a second and peer, however many messages there are.
PEER_GATHER_S = 0.002
# One timeout does not make a peer unreachable if it has answered within this time.
PEER_SILENCE_S = 3.0
# What is sent to a peer, or asked of it, in one exchange at most: some 100,000 entries.
EXCHANGE_PACKETS_MAX = 50
# Calls that are answered at the same time: of one peer (its own maximum and one exchange, and again while it restarts),
# and altogether. A packet or two are held for each.
PEER_ANSWERS_MAX = 2 * (PEER_CALLS_MAX + 1)
ANSWERS_MAX = 256
# A connection over which nothing comes is given up after the sum of these, and tried again within the last one.
PEER_KEEPALIVE_S = 1.0
PEER_KEEPALIVE_TIMEOUT_S = 2.0
PEER_RECONNECT_S_MIN = 0.2
PEER_RECONNECT_S_MAX = 2.0
# Whoever connects must have shown a certificate by then.
PEER_HANDSHAKE_S_MAX = 5.0
PEER_GRACE_S = 0.5
# With new certificates the port is closed and opened; if somebody takes it meanwhile, tried again after this.
PEER_RESTART_S = 1.0
# Of each peer so many reasons for refusing it are logged, and of so many peers.
REFUSALS_MAX = 10
REFUSED_PEERS_MAX = 1_000
# Of what the gRPC library writes: whoever tries to connect can make it write a line.
LIBRARY_READ_BYTES = 64 * 1024
LIBRARY_LINE_REPEAT_S = 60.0
LIBRARY_LINES_MAX = 1_000
# A cluster that stops because a certificate was forgotten is worse than an old certificate.
CERTIFICATE_DAYS_OF_CA = 7_300
CERTIFICATE_DAYS_OF_NODE = 3_650
CERTIFICATE_DAYS_MAX = 36_500
# The clocks of the nodes may differ so much when a certificate is new.
CERTIFICATE_BACKDATE_DAYS = 1
CERTIFICATE_WARN_DAYS = 30
# How often the files are looked at.
CERTIFICATES_INTERVAL_S = 1.0
# A key is made of one request.
PEER_KEY_BYTES_MAX = 2 * REQUEST_BYTES_MAX

# So long there is work on what peers say before Postfix is answered again.
TURN_S = 0.000_2
# A thread that reads a large limits file or prepares a flush must not keep a request waiting longer than this.
SWITCH_INTERVAL_S = 0.000_5
# The cyclic garbage collector frees what gRPC's calls leave behind, 0.02 ms each: so it looks at what is new after few
# objects; at what survived that after 20 times, some ms; and at everything, 10 to 20 ms, after 20,000 times: minutes.
GARBAGE_THRESHOLDS = (300, 20, 1_000)


# --- this node in the cluster -----------------------------------------------------------------------------------------
# Messages about rights cost some 30 us each: so many are taken before Postfix is answered again.
HEAR_MESSAGES_MAX = 20
# Rights are looked after this often: a search whose peers do not answer goes on after 60 ms.
TEND_INTERVAL_S = 0.02
# Requests that wait for rights; more are refused at once. Each is a connection of an smtpd process.
WAITING_MAX = 10_000
# Requests that are decided again in one go, some 50 us each.
RESUME_MAX = 20
# Nobody was reached for so long: this node may use its overdraft.
ISOLATED_S = 10.0
# What was lent and borrowed is told the others with the next exchange, which comes every second.
COMMITTED_INTERVAL_S = 0.2
# How much is lent and borrowed is told of so many meters, the first that there are.
BOOKS_LOOKED_AT_MAX = 1_000
# A start waits so long for etcd, and then goes on with what is on the disk.
ETCD_START_S = 3.0
# A node that cannot join yet looks again.
JOIN_RETRY_S = 1.0
# How far a node's state has come is told this often; a backup that is younger cannot be told from it. One fsync each.
REGISTER_INTERVAL_S = 10.0
# A node that does not reach etcd for so long misses a reset, and goes on counting what the key has used there.
RESET_TTL_S = 60
# Who has more problems reads no further.
STATUS_PROBLEMS_MAX = 100
# Of overrides that change at once, so many are logged; a control panel may put thousands.
OVERRIDES_LOGGED_MAX = 20
# What changes at once is told once.
STATUS_PAUSE_S = 0.2
# Changes of the roster that are under way; more than machines die at once.
GENERATIONS_MAX = 50
ROSTER_NODES_MAX = 1_000
# Nodes that were declared stopped, remembered so that they see it when they come back.
STOPPED_NODES_MAX = 1_000

# --- storage --------------------------------------------------------------------------------------------------------
FLUSH_INTERVAL_S = 0.1
# A flush is prepared, and stored, in portions of so many keys: no request waits for more than one (some 0.3 ms).
FLUSH_ROWS_MAX = 100
FORGET_PARTS_MAX = 1_000
# A slice is written anew when so many times its keys have been appended to the log.
LOG_PART_MAX = 4
# A message that has to wait for the disk longer than this is answered with the fail-safe.
FLUSH_WAIT_S_MAX = 5.0
FLUSH_RETRY_S_MAX = 5.0
# Nothing charged for so long: the state is marked clean, and a crash costs nothing.
IDLE_CLEAN_S = 60.0

# --- etcd -------------------------------------------------------------------------------------------------------------
# One call to one member. An etcd that elects a leader answers after 1 to 2 s.
ETCD_CALL_S = 3.0
# So long the members are tried in turn before a call is said to have failed; each of them at least once.
ETCD_PATIENCE_S = 3.0
# Pauses between tries grow from the one to the other: a recovery is noticed within about 2 s.
ETCD_RETRY_S_MIN = 0.05
ETCD_RETRY_S_MAX = 1.0
# A watch that says nothing for so long is asked whether it is still there.
ETCD_QUIET_S = 2.0
# etcd takes a client that pings more often than every 5 s for hostile, and disconnects it.
ETCD_PING_S = 10.0
# One response: larger ones are asked for in smaller pages. etcd's own limit for a value is 1.5 MiB.
ETCD_MESSAGE_BYTES_MAX = 16 * 1024 * 1024
# Each page costs etcd a walk over all keys of the prefix: some 10 ms with 100,000.
ETCD_PAGE_KEYS = 2_000
# What is taken from a page before Postfix is answered again: 0.5 ms.
ETCD_PORTION_KEYS = 500
# What is kept of etcd at most: twice as many overrides as are used, and what is refused.
ETCD_KEYS_MAX = 400_000
ETCD_BYTES_MAX = 256 * 1024 * 1024
# One value. A limit with many conditions has 2 kB.
LIMIT_BYTES_MAX = 64 * 1024
OVERRIDE_BYTES_MAX = 4 * 1024
OVERRIDES_MAX = 200_000
# Overrides that are put alike are read once: most are one of few numbers.
OVERRIDE_TEXTS_MAX = 10_000
# So many are read before Postfix is answered again: 0.01 ms each, or 0.1 if all are written differently.
ETCD_SETTLE_KEYS = 20
# A node that is gone is shown as gone after so long; it says that it is there three times in that time.
PRESENCE_TTL_S = 10
# What lasts is logged again so often.
OUTAGE_LOG_S = 300.0

# --- files and the command line ---------------------------------------------------------------------------------------
FILE_BYTES_MAX = 16 * 1024 * 1024
LIMITS_MAX = 1_000
CONDITION_DEPTH_MAX = 8
DRAIN_S_MAX = 5.0

# --- the admin socket -------------------------------------------------------------------------------------------------
# One policy request is the largest thing that is asked.
CONTROL_BYTES_MAX = 2 * REQUEST_BYTES_MAX
# Command lines, monitoring, and who watches the health; each holds some 100 kB at most.
CONTROL_CALLS_MAX = 64
# Who watches the health does so for ever, and must not delay a restart.
CONTROL_GRACE_S = 0.5
# So many keys are looked at before Postfix is answered again: about 0.02 ms for `top`, 0.5 ms for likely spellings.
SCAN_ROWS_MAX = 500
# With keys of KEY_CHARS_MAX an answer stays below the 4 MB that gRPC clients take.
TOP_KEYS_MAX = 1_000
NEAREST_KEYS_MAX = 5
# The command line waits so long: `top` over a million keys on a busy node takes some seconds.
CALL_TIMEOUT_S = 30.0
WATCH_S_MIN = 0.1
# What other nodes told is shown without its age if it is not older: some rounds of exchanges.
FRESH_MS = 5_000
