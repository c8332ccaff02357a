package cryptohook

import (
	"sync"
	"sync/atomic"
	"time"
)

// Limits bound what strangers can make a hook hold and do. Zero stands for the default. What a limit keeps from being done is logged
// and counted ([Hook.Stats]); none of them drops a room key that is of a proper size, or an event that was not told of.
type Limits struct {
	// QueuedEvents is how many events are in memory, waiting for their turn or for what they lack. More stay in the database until
	// there is room. 20,000 by default, of a few hundred bytes each.
	QueuedEvents int
	// WaitingPerSender and WaitingPerRoom are how many events wait for their keys at a time. What exceeds them is told as
	// [CodeUnableToDecrypt] at once, not after [Options].KeyWait, and comes to its handler again if its key comes after all. A
	// sender's first few may wait whatever the others in the room do. 100 and 500 by default.
	WaitingPerSender, WaitingPerRoom int
	// LatePerSender is how many events of one sender that were told as [CodeUnableToDecrypt] are kept for a day in case that their
	// keys come. More are told of, and then forgotten. 1,000 by default.
	LatePerSender int
	// ToDeviceBytes is the size of the largest encrypted to-device event that is looked at. Larger ones are ignored. 64 KiB by default;
	// a room key takes 3.
	ToDeviceBytes int
	// SearchesPerSender and SearchesPerRoom are how many keys are looked for in an hour, in the backup and with our other devices. More
	// are looked for in the next hour if somebody wants them then. 100 and 500 by default.
	SearchesPerSender, SearchesPerRoom int
}

// waitingAnyway is how many events of each sender may wait for their keys in a room that has reached its limit.
const waitingAnyway = 10

// DefaultLimits are the limits that apply when nobody says otherwise.
func DefaultLimits() Limits { return Limits{}.withDefaults() }

func (l Limits) withDefaults() Limits {
	for _, limit := range []struct {
		value    *int
		fallback int
	}{
		{&l.QueuedEvents, 20_000},
		{&l.WaitingPerSender, 100},
		{&l.WaitingPerRoom, 500},
		{&l.LatePerSender, 1000},
		{&l.ToDeviceBytes, 64 << 10},
		{&l.SearchesPerSender, 100},
		{&l.SearchesPerRoom, 500},
	} {
		if *limit.value == 0 {
			*limit.value = limit.fallback
		}
	}
	return l
}

// Limit names one of the [Limits], for counting how often it was reached.
type Limit string

const (
	LimitQueuedEvents Limit = "queued_events"
	LimitWaiting      Limit = "waiting_events"
	LimitLate         Limit = "late_events"
	LimitToDevice     Limit = "to_device_bytes"
	LimitSearches     Limit = "key_searches"
)

// counted are the limits that are counted.
var counted = []Limit{LimitQueuedEvents, LimitWaiting, LimitLate, LimitToDevice, LimitSearches}

// Stats are a hook's numbers, for monitoring. The counts are since [Install].
type Stats struct {
	// SyncedAt is when the last /sync was processed. Zero: none yet.
	SyncedAt time.Time
	// QueuedEvents is how many events are in memory, WaitingEvents how many of them wait for a key, or for what their senders publish.
	QueuedEvents, WaitingEvents int
	// KeySearches is how many keys are being looked for, PendingUsers how many users' keys are to be asked for.
	KeySearches, PendingUsers int
	// KeysToBackUp is how many sessions are to be put into the account's key backup, as of the last batch; 0 while there is none that is
	// kept: see [Hook.KeepBackup]. BackedUpAt is when the last batch was put there. Zero: none yet.
	KeysToBackUp int
	BackedUpAt   time.Time
	// Events counts those that were handed to handlers, RoomKeys the keys that were stored, and JudgedAgain how often all unproven sessions
	// of a user were looked at again, since something about the user was learnt.
	Events, RoomKeys, JudgedAgain uint64
	// FailedSyncs, KeyQueries, FailedKeyQueries and FailedWrites count requests to the server and transactions of the database.
	FailedSyncs, KeyQueries, FailedKeyQueries, FailedWrites uint64
	// Reached counts for each limit what it has kept from being done.
	Reached map[Limit]uint64
}

// counters are what [Stats] is made of.
type counters struct {
	syncedAt                                          atomic.Int64 // milliseconds; 0: never
	events, failedSyncs, keyQueries, failedKeyQueries atomic.Uint64
	judgedAgain                                       atomic.Uint64

	mu      sync.Mutex
	reached map[Limit]uint64
}

func (c *counters) keyQuery(answered bool) {
	c.keyQueries.Add(1)
	if !answered {
		c.failedKeyQueries.Add(1)
	}
}

// reach counts that a limit was reached.
func (c *counters) reach(limit Limit) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reached == nil {
		c.reached = make(map[Limit]uint64)
	}
	c.reached[limit]++
}

func (c *counters) limits() map[Limit]uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	reached := make(map[Limit]uint64, len(counted))
	for _, limit := range counted {
		reached[limit] = c.reached[limit]
	}
	return reached
}

// Stats gives the numbers as they are now.
func (h *Hook) Stats() Stats {
	stats := Stats{
		Events: h.counters.events.Load(), RoomKeys: h.inbox.keys.Load(), JudgedAgain: h.counters.judgedAgain.Load(),
		FailedSyncs: h.counters.failedSyncs.Load(), KeyQueries: h.counters.keyQueries.Load(), FailedKeyQueries: h.counters.failedKeyQueries.Load(),
		FailedWrites: h.store.failures.Load(), Reached: h.counters.limits(),
	}
	if ms := h.counters.syncedAt.Load(); ms != 0 {
		stats.SyncedAt = time.UnixMilli(ms)
	}
	stats.QueuedEvents, stats.WaitingEvents = h.inbox.lengths()
	stats.KeySearches = h.search.length()
	stats.PendingUsers = h.resolver.length()
	stats.KeysToBackUp = int(h.keeper.waiting.Load())
	if ms := h.keeper.uploadedAt.Load(); ms != 0 {
		stats.BackedUpAt = time.UnixMilli(ms)
	}
	return stats
}
