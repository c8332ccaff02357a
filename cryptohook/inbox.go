package cryptohook

import (
	"context"
	"encoding/json"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// inbox hands room events to their handlers: decrypted, judged, in the order of each room, at least once. An event whose key
// or whose sender's keys are still on their way is set aside and does not hold up those after it. What the process did not get
// to, the next one does.
type inbox struct {
	hook *Hook
	wake chan struct{}
	// lastSeq numbers the events.
	lastSeq atomic.Int64
	// keys counts the Megolm sessions that were stored.
	keys atomic.Uint64

	mu    sync.Mutex
	rooms map[id.RoomID]*roomInbox
	// held counts the events in memory.
	held int
	// slots bounds how many rooms are at work at once.
	slots chan struct{}
}

// roomInbox is the queue of one room, worked through by one goroutine.
type roomInbox struct {
	wake    chan struct{}
	queue   []*inboxEvent
	waiting []*inboxEvent
}

const (
	roomsAtOnce = 8
	heldAtMost  = 1000
	loadAtOnce  = 200
	keepHandled = 7 * 24 * time.Hour
	pruneEvery  = time.Hour
	// keepLate is how long an event whose key has not come in time waits on.
	keepLate   = 24 * time.Hour
	flushRetry = time.Second
)

func newInbox(hook *Hook) *inbox {
	return &inbox{
		hook: hook, wake: make(chan struct{}, 1),
		rooms: make(map[id.RoomID]*roomInbox), slots: make(chan struct{}, roomsAtOnce),
	}
}

func (in *inbox) signal() {
	notify(in.wake)
	in.wakeRooms()
}

// wakeRooms has every room look at its waiting events again: a key came, or something about a sender was learnt.
func (in *inbox) wakeRooms() {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, room := range in.rooms {
		notify(room.wake)
	}
}

func notify(wake chan struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// run loads events as they come and keeps a goroutine for each room that has any, until the context ends.
func (in *inbox) run(ctx context.Context) {
	log := in.hook.log.With().Str("component", "inbox").Logger()
	ctx = log.WithContext(ctx)
	var rooms sync.WaitGroup
	defer rooms.Wait()
	var loaded int64
	var pruned time.Time
	for ctx.Err() == nil {
		if now := in.hook.clock(); now.Sub(pruned) > pruneEvery {
			pruned = now
			if err := in.hook.store.prune(ctx, now.Add(-keepHandled)); err != nil {
				log.Err(err).Msg("Failed to forget old events")
			}
			if err := in.hook.store.giveUpLate(ctx, now.Add(-keepLate)); err != nil {
				log.Err(err).Msg("Failed to give up events whose keys have not come")
			}
		}
		events, err := in.load(ctx, loaded)
		if err != nil && ctx.Err() == nil {
			log.Err(err).Msg("Failed to load waiting events, trying again")
		}
		for _, e := range events {
			loaded = e.seq
			in.enqueue(ctx, &rooms, e)
		}
		if len(events) > 0 {
			continue
		}
		timer := time.NewTimer(pruneEvery)
		if err != nil {
			timer.Reset(flushRetry)
		}
		select {
		case <-ctx.Done():
		case <-in.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (in *inbox) load(ctx context.Context, after int64) ([]*inboxEvent, error) {
	in.mu.Lock()
	room := heldAtMost - in.held
	in.mu.Unlock()
	if room <= 0 {
		return nil, nil
	}
	return in.hook.store.pendingInbox(ctx, after, min(room, loadAtOnce))
}

func (in *inbox) enqueue(ctx context.Context, workers *sync.WaitGroup, e *inboxEvent) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.held++
	room, active := in.rooms[e.roomID]
	if !active {
		room = &roomInbox{wake: make(chan struct{}, 1)}
		in.rooms[e.roomID] = room
		workers.Go(func() { in.work(ctx, e.roomID, room) })
	}
	room.queue = append(room.queue, e)
	notify(room.wake)
}

// work handles the events of one room until there are none.
func (in *inbox) work(ctx context.Context, roomID id.RoomID, room *roomInbox) {
	for ctx.Err() == nil {
		due, next, done := in.take(roomID, room)
		if done {
			return
		}
		if len(due) > 0 {
			in.handleAll(ctx, room, due)
			continue
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-room.wake:
		case <-timer.C:
		}
		timer.Stop()
		in.requeue(room)
	}
}

// take gives the events that are to be tried now. Without any it says how long to wait for the next that gives up waiting. A
// room without events is done, and forgotten.
func (in *inbox) take(roomID id.RoomID, room *roomInbox) (due []*inboxEvent, next time.Duration, done bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(room.queue) == 0 && len(room.waiting) == 0 {
		delete(in.rooms, roomID)
		return nil, 0, true
	}
	due, room.queue = room.queue, nil
	next = in.hook.options.KeyWait
	now := in.hook.clock()
	for _, e := range room.waiting {
		next = min(next, e.retryAt.Sub(now))
	}
	return due, max(next, 10*time.Millisecond), false
}

// requeue has the waiting events tried again, before newer ones.
func (in *inbox) requeue(room *roomInbox) {
	in.mu.Lock()
	defer in.mu.Unlock()
	room.queue = append(room.waiting, room.queue...)
	room.waiting = nil
}

func (in *inbox) handleAll(ctx context.Context, room *roomInbox, due []*inboxEvent) {
	in.slots <- struct{}{}
	defer func() { <-in.slots }()
	for _, e := range due {
		if ctx.Err() != nil {
			return
		}
		handled := in.handle(ctx, e)
		in.mu.Lock()
		if handled {
			in.held--
		} else {
			room.waiting = append(room.waiting, e)
		}
		in.mu.Unlock()
		if handled {
			notify(in.wake)
		}
	}
}

// handle judges the event and hands it on. It says no to an event that has to wait.
func (in *inbox) handle(ctx context.Context, e *inboxEvent) bool {
	h := in.hook
	log := zerolog.Ctx(ctx).With().Stringer("room_id", e.roomID).Stringer("event_id", e.eventID).Logger()
	ctx = log.WithContext(ctx)
	evt, err := e.parse()
	if err != nil {
		log.Warn().Err(err).Msg("Ignoring an event that cannot be parsed")
		h.uow.stage(func(ctx context.Context) error { return h.store.markHandled(ctx, e.eventID) })
		return true
	}
	log = log.With().Stringer("sender", evt.Sender).Logger()
	ctx = log.WithContext(ctx)
	keys := in.keys.Load()
	judged, verdict, wait, err := h.judge(ctx, e, evt)
	if err == nil && wait == 0 {
		// The message index has to be known for good before anybody acts on the message.
		err = h.uow.flush(ctx)
	}
	if err != nil {
		if ctx.Err() == nil {
			log.Err(err).Msg("Failed to judge an event, trying again")
		}
		wait = flushRetry
	}
	if wait > 0 {
		e.retryAt = h.clock().Add(wait)
		return false
	}
	late := verdict.mayComeLate()
	if verdict.Late = e.told; !e.told || !late {
		attach(judged, verdict)
		h.dispatch(ctx, judged)
	}
	if ctx.Err() != nil {
		// The handler was cut short. It gets the event again.
		return false
	}
	if late {
		h.uow.stage(func(ctx context.Context) error { return h.keepLate(ctx, e, verdict.SessionID, keys) })
	} else {
		h.uow.stage(func(ctx context.Context) error { return h.store.markHandled(ctx, e.eventID) })
	}
	return true
}

// keepLate keeps an event until its key comes after all. If one has come since the event was judged, it is judged again at once.
func (h *Hook) keepLate(ctx context.Context, e *inboxEvent, sessionID id.SessionID, keysBefore uint64) error {
	if err := h.store.markLate(ctx, e.eventID, sessionID); err != nil {
		return err
	}
	if h.inbox.keys.Load() == keysBefore {
		return nil
	}
	return h.store.wakeLate(ctx, sessionID, h.inbox.nextSeq)
}

// wakeLate has the events looked at again that wait for a key of the session. It is part of storing the key.
func (h *Hook) wakeLate(ctx context.Context, sessionID id.SessionID) error {
	h.inbox.keys.Add(1)
	return h.store.wakeLate(ctx, sessionID, h.inbox.nextSeq)
}

func (in *inbox) nextSeq() int64 { return in.lastSeq.Add(1) }

func (h *Hook) dispatch(ctx context.Context, evt *event.Event) {
	defer func() {
		if reason := recover(); reason != nil {
			zerolog.Ctx(ctx).Error().Any("panic", reason).Bytes("stack", debug.Stack()).Msg("A handler panicked; going on without it")
		}
	}()
	h.syncer.Dispatch(ctx, evt)
}

func (e *inboxEvent) parse() (*event.Event, error) {
	var evt event.Event
	if err := json.Unmarshal([]byte(e.event), &evt); err != nil {
		return nil, err
	}
	evt.ID, evt.RoomID = e.eventID, e.roomID
	evt.Type.Class = event.MessageEventType
	evt.Mautrix.EventSource = event.SourceJoin | event.SourceTimeline
	evt.Mautrix.ReceivedAt = e.receivedAt
	// Content that is not what its type says is for the handler to see; who sent it can be told all the same.
	if evt.Content.ParseRaw(evt.Type) != nil {
		evt.Content.Parsed = nil
	}
	return &evt, nil
}
