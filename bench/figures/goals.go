package figures

// Goal is a row of the table: what is compared, and how it should come out.
type Goal struct {
	// Work says what is measured, in words; Other what it is compared with, in words, unless that is one of the other sides.
	Work, Other string
	Of          Key
	// Against is what the quantity is compared with; nothing for one that stands for itself.
	Against *Key
	// AtMost is the greatest ratio, or the greatest value in the quantity's unit. Zero: there is no goal.
	AtMost float64
}

// Sides and stores, as the figures name them.
const (
	hook, stock, reference                     = "hook", "stock", "reference"
	sqliteFull, sqliteNormal, postgres, memory = "sqlite-full", "sqlite-normal", "postgres", "memory"
	micros                                     = "us_each"
)

// Stored are the numbers of sessions in the database for which the cost is measured.
var Stored = []int{1000, 10_000, 100_000, 1_000_000}

// Goals are the rows of the table.
func Goals() []Goal {
	var goals []Goal
	add := func(work string, of Key, against Key, atMost float64) {
		goals = append(goals, Goal{Work: work, Of: of, Against: &against, AtMost: atMost})
	}
	at := func(side, store, work string) Key { return Key{Side: side, Store: store, Work: work, Quantity: micros} }
	const (
		receive1   = "receive a room key, its sender derived and stored; one sending device"
		receive200 = "the same; 200 sending devices"
		first      = "first message of a device: a room key in a new Olm session"
		warm       = "decrypt a message and say who sent it; session in use"
		cold       = "the same; session from the database"
		query      = "first key query, a device (1,000 users with 5 each)"
	)
	add(receive1, at(hook, sqliteFull, "receive_1"), at(reference, sqliteFull, "receive_1"), 0.25)
	add(receive1+"; ours on disk", at(hook, sqliteFull, "receive_1"), at(reference, memory, "receive_1"), 0.7)
	add(receive1+"; without full sync", at(hook, sqliteNormal, "receive_1"), at(reference, sqliteNormal, "receive_1"), 0.25)
	add(receive200, at(hook, sqliteFull, "receive_200"), at(reference, sqliteFull, "receive_200"), 0.33)
	add(receive200+"; without full sync", at(hook, sqliteNormal, "receive_200"), at(reference, sqliteNormal, "receive_200"), 0.33)
	add(first, at(hook, sqliteFull, "first_message"), at(reference, sqliteFull, "first_message"), 0.8)
	add(warm, at(hook, sqliteFull, "decrypt_warm"), at(reference, sqliteFull, "decrypt_warm"), 0.4)
	add(cold, at(hook, sqliteFull, "decrypt_cold"), at(reference, sqliteFull, "decrypt_cold"), 0.6)
	add(warm+"; the reference not asked who", at(hook, sqliteFull, "decrypt_warm"), at(reference, sqliteFull, "decrypt_only_warm"), 0)
	add(query, at(hook, sqliteFull, "key_query"), at(reference, sqliteFull, "key_query"), 1)
	for _, work := range []struct{ words, name string }{
		{receive1, "receive_1"}, {receive200, "receive_200"}, {first, "first_message"}, {warm, "decrypt_warm"}, {cold, "decrypt_cold"}, {query, "key_query"},
	} {
		atMost := 0.0
		if work.name == "receive_1" || work.name == "receive_200" {
			atMost = 0.4
		}
		add(work.words, at(hook, sqliteFull, work.name), at(stock, sqliteFull, work.name), atMost)
	}
	for _, work := range []struct{ words, name string }{
		{receive1, "receive_1"}, {receive200, "receive_200"}, {first, "first_message"}, {warm, "decrypt_warm"}, {cold, "decrypt_cold"}, {query, "key_query"},
	} {
		add(work.words+"; PostgreSQL", at(hook, postgres, work.name), at(stock, postgres, work.name), 1)
	}
	return append(goals, manySessions()...)
}

// manySessions are the rows about memory, and about what grows.
func manySessions() []Goal {
	quantity := func(side, work, name string, stored int) Key {
		return Key{Side: side, Store: sqliteFull, Work: work, Stored: stored, Quantity: name}
	}
	against := func(key Key) *Key { return &key }
	most := Stored[len(Stored)-1]
	return []Goal{
		{Work: "peak memory receiving 2,000 keys", Of: quantity(hook, "memory_2000", "peak_kib", 0), Against: against(quantity(reference, "memory_2000", "peak_kib", 0)), AtMost: 1.5},
		{Work: "live heap after it", Of: quantity(hook, "memory_2000", "live_kib", 0), Against: against(quantity(reference, "memory_2000", "live_kib", 0)), AtMost: 1.5},
		{Work: "resident memory after it", Of: quantity(hook, "memory_2000", "resident_kib", 0), Against: against(quantity(reference, "memory_2000", "resident_kib", 0))},
		{
			Work: "peak memory receiving 100,000 keys", Other: "ours, 2,000 keys",
			Of: quantity(hook, "memory_100000", "peak_kib", 0), Against: against(quantity(hook, "memory_2000", "peak_kib", 0)), AtMost: 1.3,
		},
		{
			Work: "receive a room key with 1,000,000 sessions stored", Other: "ours, 1,000 stored",
			Of: quantity(hook, "receive_stored", micros, most), Against: against(quantity(hook, "receive_stored", micros, Stored[0])), AtMost: 1.3,
		},
		{
			Work: "decrypt a message and say who sent it, with 1,000,000 sessions stored", Other: "ours, 1,000 stored",
			Of: quantity(hook, "decrypt_stored", micros, most), Against: against(quantity(hook, "decrypt_stored", micros, Stored[0])), AtMost: 1.3,
		},
		{Work: "start with 1,000,000 sessions", Of: quantity(hook, "start_stored", micros, most), AtMost: 1e6},
		{Work: "peak memory of that start", Of: quantity(hook, "start_stored", "peak_kib", most), AtMost: 100 << 10},
		{Work: "one user's identity changes: 10,000 sessions judged again, durable", Of: quantity(hook, "identity_change", micros, 0), AtMost: 1e6},
		{Work: "a room of 5,000 members: requests from joining to the first verdict", Of: quantity(hook, "room_5000", "requests", 0), AtMost: 50},
		{Work: "peak memory of that joining", Of: quantity(hook, "room_5000", "peak_kib", 0)},
		{Work: "the bot's share of an answer's latency at 50 messages a second: median", Of: quantity(hook, "answers_50", "p50_us", 0), AtMost: 5000},
		{Work: "the same: 99 of 100", Of: quantity(hook, "answers_50", "p99_us", 0), AtMost: 25_000},
		{Work: "messages answered at most, by one bot; the homeserver costs next to nothing, so the bot is the limit", Of: quantity(hook, "answers_most", "answers_per_s", 0)},
	}
}

// sidesInWords are the other sides, as the table names them.
var sidesInWords = map[string]string{stock: "stock mautrix", reference: "reference", hook: "ours"}

// other says in words what the goal compares with.
func (g Goal) other() string {
	switch {
	case g.Against == nil:
		return ""
	case g.Other != "":
		return g.Other
	case g.Against.Store == memory:
		return sidesInWords[g.Against.Side] + " in memory"
	default:
		return sidesInWords[g.Against.Side]
	}
}
