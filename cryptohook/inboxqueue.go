package cryptohook

import (
	"container/heap"
	"time"

	"maunium.net/go/mautrix/id"
)

// heldEvents are the events that the inbox has in memory: those that wait for their turn, in the queues of their rooms, those that are
// being judged, and those that were set aside. Whoever sends thousands of events, or events whose keys never come, costs the others no
// more than a few turns.
type heldEvents struct {
	rooms map[id.RoomID]*roomQueue
	// ready are the rooms that have something queued and that nobody is at work in, in turn.
	ready []*roomQueue
	held  int
	// waiting are the events that were set aside.
	waiting map[*inboxEvent]struct{}
	// stirred are events whose keys may have come: see tryStirred.
	stirred map[*inboxEvent]struct{}
	// bySession and bySender find the events that something may have come for.
	bySession map[id.SessionID]map[*inboxEvent]struct{}
	bySender  map[id.UserID]map[*inboxEvent]struct{}
	// keysOfSender, keysOfRoom and keysOfPair count the events that were set aside for lack of a key.
	keysOfSender map[id.UserID]int
	keysOfRoom   map[id.RoomID]int
	keysOfPair   map[roomSender]int
}

type roomSender struct {
	roomID id.RoomID
	sender id.UserID
}

func newHeldEvents() heldEvents {
	return heldEvents{
		rooms: make(map[id.RoomID]*roomQueue), waiting: make(map[*inboxEvent]struct{}), stirred: make(map[*inboxEvent]struct{}),
		bySession: make(map[id.SessionID]map[*inboxEvent]struct{}), bySender: make(map[id.UserID]map[*inboxEvent]struct{}),
		keysOfSender: make(map[id.UserID]int), keysOfRoom: make(map[id.RoomID]int), keysOfPair: make(map[roomSender]int),
	}
}

// eventPlace is where a held event is.
type eventPlace int

const (
	placeNone eventPlace = iota
	placeQueued
	placeTaken
	placeAside
)

// roomQueue is the queue of one room. Its events come in their order, by laps: in each, everybody has a few.
type roomQueue struct {
	roomID id.RoomID
	events eventHeap
	// lap is that of the event that was taken last.
	lap     int
	senders map[id.UserID]*queuedSender
	// busy says that an event of the room is being judged.
	busy bool
}

// queuedSender is how many events of a sender are in a queue, and the lap of the last one.
type queuedSender struct{ events, lap int }

// eventsPerLap is how many events of one sender come before another's that came later.
const eventsPerLap = 10

func (q *roomQueue) push(e *inboxEvent) {
	sender := q.senders[e.sender]
	if sender == nil {
		sender = new(queuedSender)
		q.senders[e.sender] = sender
	}
	sender.lap = max(sender.lap, q.lap+sender.events/eventsPerLap)
	sender.events++
	e.lap, e.place = sender.lap, placeQueued
	heap.Push(&q.events, e)
}

func (q *roomQueue) pop() *inboxEvent {
	e := heap.Pop(&q.events).(*inboxEvent)
	q.lap = max(q.lap, e.lap)
	if sender := q.senders[e.sender]; sender.events > 1 {
		sender.events--
	} else {
		delete(q.senders, e.sender)
	}
	e.place = placeTaken
	return e
}

type eventHeap []*inboxEvent

func (h eventHeap) Len() int      { return len(h) }
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(e any)   { *h = append(*h, e.(*inboxEvent)) }
func (h eventHeap) Less(i, j int) bool {
	return h[i].lap < h[j].lap || h[i].lap == h[j].lap && h[i].seq < h[j].seq
}

func (h *eventHeap) Pop() any {
	last := len(*h) - 1
	e := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return e
}

// add takes an event into memory.
func (m *heldEvents) add(e *inboxEvent) {
	m.held++
	m.watch(e)
	m.queue(e)
}

func (m *heldEvents) queue(e *inboxEvent) {
	room := m.rooms[e.roomID]
	if room == nil {
		room = &roomQueue{roomID: e.roomID, senders: make(map[id.UserID]*queuedSender)}
		m.rooms[e.roomID] = room
	}
	if len(room.events) == 0 && !room.busy {
		m.ready = append(m.ready, room)
	}
	delete(m.waiting, e)
	room.push(e)
}

// take gives the next event of the room whose turn it is, or nothing. The room has no other turn until that is put back: by remove or
// setAside.
func (m *heldEvents) take() *inboxEvent {
	if len(m.ready) == 0 {
		return nil
	}
	room := m.ready[0]
	m.ready[0] = nil
	m.ready = m.ready[1:]
	room.busy = true
	return room.pop()
}

// remove forgets an event that was handled. While its key may come late, it is watched on.
func (m *heldEvents) remove(e *inboxEvent) {
	m.held--
	m.count(e, false)
	m.end(e, placeNone)
}

// setAside has an event wait, unless something has come for it while it was judged.
func (m *heldEvents) setAside(e *inboxEvent) {
	m.count(e, e.awaitsKey)
	if e.again {
		e.again = false
		m.end(e, placeNone)
		m.queue(e)
		return
	}
	m.waiting[e] = struct{}{}
	m.end(e, placeAside)
}

// end has the next event of the room have its turn.
func (m *heldEvents) end(e *inboxEvent, place eventPlace) {
	e.place = place
	room := m.rooms[e.roomID]
	room.busy = false
	switch {
	case len(room.events) > 0:
		m.ready = append(m.ready, room)
	default:
		delete(m.rooms, e.roomID)
	}
}

// count notes whether an event lacks its key.
func (m *heldEvents) count(e *inboxEvent, lacksKey bool) {
	if e.lacksKey == lacksKey {
		return
	}
	e.lacksKey = lacksKey
	change := -1
	if lacksKey {
		change = 1
	}
	addTo(m.keysOfSender, e.sender, change)
	addTo(m.keysOfRoom, e.roomID, change)
	addTo(m.keysOfPair, roomSender{e.roomID, e.sender}, change)
}

func addTo[K comparable](counts map[K]int, key K, change int) {
	if counts[key] += change; counts[key] == 0 {
		delete(counts, key)
	}
}

// watch has an event found by its session and its sender.
func (m *heldEvents) watch(e *inboxEvent) {
	if e.sessionID != "" {
		insertInto(m.bySession, e.sessionID, e)
	}
	insertInto(m.bySender, e.sender, e)
}

func (m *heldEvents) unwatch(e *inboxEvent) {
	removeFrom(m.bySession, e.sessionID, e)
	removeFrom(m.bySender, e.sender, e)
	delete(m.stirred, e)
}

func insertInto[K comparable](index map[K]map[*inboxEvent]struct{}, key K, e *inboxEvent) {
	if index[key] == nil {
		index[key] = make(map[*inboxEvent]struct{})
	}
	index[key][e] = struct{}{}
}

func removeFrom[K comparable](index map[K]map[*inboxEvent]struct{}, key K, e *inboxEvent) {
	if delete(index[key], e); len(index[key]) == 0 {
		delete(index, key)
	}
}

// stirs is how often an event is tried again after something came for it: what came may not be committed yet when it is tried first, and
// while it is not, hardly anything else can be.
const stirs = 3

// stirIn notes that a key of the session is being stored.
func (m *heldEvents) stirIn(sessionID id.SessionID) {
	for e := range m.bySession[sessionID] {
		e.keysCame++
		m.stir(e)
	}
}

// stirOf notes that a sender withholds a session's key, or any.
func (m *heldEvents) stirOf(sender id.UserID, sessionID id.SessionID) {
	for e := range m.bySender[sender] {
		if sessionID == "" || e.sessionID == sessionID {
			m.stir(e)
		}
	}
}

func (m *heldEvents) stir(e *inboxEvent) {
	e.stirs = stirs
	m.stirred[e] = struct{}{}
}

// tryStirred has the stirred events tried again.
func (m *heldEvents) tryStirred() {
	for e := range m.stirred {
		if e.stirs--; e.stirs <= 0 {
			delete(m.stirred, e)
		}
		m.try(e)
	}
}

// tryOf has the user's events tried again that wait for what the user publishes.
func (m *heldEvents) tryOf(userID id.UserID) {
	for e := range m.bySender[userID] {
		if !e.lacksKey {
			m.try(e)
		}
	}
}

// try has an event tried again: now if it waits, once more if it is being judged. One that is queued will be anyway.
func (m *heldEvents) try(e *inboxEvent) {
	switch e.place {
	case placeAside:
		m.queue(e)
	case placeTaken:
		e.again = true
	}
}

// tryDue has the events tried again that have waited until now, and gives the time of the next one, or zero.
func (m *heldEvents) tryDue(now time.Time) (next time.Time) {
	for e := range m.waiting {
		if !e.retryAt.After(now) {
			m.queue(e)
		} else if next.IsZero() || e.retryAt.Before(next) {
			next = e.retryAt
		}
	}
	return next
}
