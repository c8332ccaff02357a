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

	"sendertrust/internal/faultpoint"
)

// inbox hands room events to their handlers: decrypted, judged, at least once. Each sender's come in the order of the room, and so do
// all of a room's as long as nobody sends so many that the others would have to wait for them. An event whose key or whose sender's keys
// are still on their way is set aside and does not hold up those after it. What the process did not get to, the next one does.
type inbox struct {
	hook *Hook
	wake chan struct{}
	// lastSeq numbers the events.
	lastSeq atomic.Int64
	// keys counts the Megolm sessions that were stored.
	keys atomic.Uint64
	// unwritten counts the events that were handled and are not noted as such for good.
	unwritten atomic.Int64
	// turn wakes those who hand the events on.
	turn chan struct{}

	mu     sync.Mutex
	events heldEvents
	// lateOf counts for each sender the events that are kept for keys that come late.
	lateOf map[id.UserID]int
	// full says that there are more events in the database than may be in memory; nextTry is when the next one that waits gives up.
	full    bool
	nextTry time.Time
}

const (
	// roomsAtOnce bounds how many rooms are at work at once.
	roomsAtOnce = 8
	loadAtOnce  = 100
	// keptText is how long an event may be, in bytes, to be kept in memory whole. Longer ones are read again at their turn.
	keptText = 2 << 10
	// unwrittenAtMost is how many events may have to be handled again after a crash.
	unwrittenAtMost = 50
	keepHandled     = 7 * 24 * time.Hour
	pruneEvery      = time.Hour
	// keepLate is how long an event whose key has not come in time waits on.
	keepLate   = 24 * time.Hour
	flushRetry = time.Second
)

func newInbox(hook *Hook) *inbox {
	return &inbox{
		hook: hook, wake: make(chan struct{}, 1), turn: make(chan struct{}, roomsAtOnce),
		events: newHeldEvents(), lateOf: make(map[id.UserID]int),
	}
}

// signal has new events handed on, and those tried again that wait for what has been committed.
func (in *inbox) signal() {
	notify(in.wake)
	in.mu.Lock()
	defer in.mu.Unlock()
	in.events.tryStirred()
	in.giveTurns()
}

// learnt has the events of these users tried again that wait for what their senders publish.
func (in *inbox) learnt(users []id.UserID) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, userID := range users {
		in.events.tryOf(userID)
	}
	in.giveTurns()
}

// withheld has the events tried again that wait for a key that their sender does not give: one session's, or any. It counts once that is
// committed.
func (in *inbox) withheld(sender id.UserID, sessionID id.SessionID) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.events.stirOf(sender, sessionID)
}

func notify(wake chan struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// giveTurns wakes as many of those who hand events on as there are rooms for them. The caller holds mu.
func (in *inbox) giveTurns() {
	for range min(len(in.events.ready), roomsAtOnce) {
		notify(in.turn)
	}
}

// run loads events as they come and has them handed on, until the context ends.
func (in *inbox) run(ctx context.Context) {
	log := in.hook.log.With().Str("component", "inbox").Logger()
	ctx = log.WithContext(ctx)
	var workers sync.WaitGroup
	defer workers.Wait()
	for range roomsAtOnce {
		workers.Go(func() { in.work(ctx) })
	}
	var loaded int64
	var pruned time.Time
	for ctx.Err() == nil {
		if now := in.hook.clock(); now.Sub(pruned) > pruneEvery {
			pruned = now
			in.prune(ctx, now)
		}
		events, err := in.load(ctx, loaded)
		if err != nil && ctx.Err() == nil {
			log.Err(err).Msg("Failed to load waiting events, trying again")
		}
		for _, e := range events {
			loaded = e.seq
			in.enqueue(e)
		}
		if len(events) > 0 {
			continue
		}
		sleep := in.tryDue()
		if err != nil {
			sleep = min(sleep, flushRetry)
		}
		timer := time.NewTimer(sleep)
		select {
		case <-ctx.Done():
		case <-in.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// prune forgets what is old, and counts what is kept.
func (in *inbox) prune(ctx context.Context, now time.Time) {
	log := zerolog.Ctx(ctx)
	if err := in.hook.store.prune(ctx, now.Add(-keepHandled)); err != nil {
		log.Err(err).Msg("Failed to forget old events")
	}
	if err := in.hook.store.giveUpLate(ctx, now.Add(-keepLate)); err != nil {
		log.Err(err).Msg("Failed to give up events whose keys have not come")
	}
	lateOf, err := in.hook.store.lateSenders(ctx)
	if err != nil {
		log.Err(err).Msg("Failed to count the events whose keys have not come")
		return
	}
	in.mu.Lock()
	in.lateOf = lateOf
	in.mu.Unlock()
}

// load gives the next events in the database, as many as there is room for.
func (in *inbox) load(ctx context.Context, after int64) ([]*inboxEvent, error) {
	in.mu.Lock()
	room := in.hook.options.Limits.QueuedEvents - in.events.held
	full := room <= 0
	if full && !in.full {
		zerolog.Ctx(ctx).Warn().Int("events", in.events.held).Msg("As many events wait as may be in memory; the others wait in the database")
		in.hook.counters.reach(LimitQueuedEvents)
	}
	in.full = full
	in.mu.Unlock()
	if full {
		return nil, nil
	}
	events, err := in.hook.store.pendingInbox(ctx, after, min(room, loadAtOnce))
	now := in.hook.clock()
	for _, e := range events {
		if e.receivedAt.After(now) { // by the clock of another process
			e.receivedAt = now
		}
		if len(e.event) > keptText {
			e.event = ""
		}
	}
	return events, err
}

func (in *inbox) enqueue(e *inboxEvent) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.events.add(e)
	in.giveTurns()
}

// tryDue has the events tried again that have waited long enough, and says how long there are no others.
func (in *inbox) tryDue() time.Duration {
	now := in.hook.clock()
	in.mu.Lock()
	defer in.mu.Unlock()
	in.nextTry = in.events.tryDue(now)
	in.giveTurns()
	if in.nextTry.IsZero() {
		return pruneEvery
	}
	return max(in.nextTry.Sub(now), 10*time.Millisecond)
}

// work hands on one event after the other: of each room in turn, of one room never two at once.
func (in *inbox) work(ctx context.Context) {
	for ctx.Err() == nil {
		in.mu.Lock()
		e := in.events.take()
		in.mu.Unlock()
		if e == nil {
			select {
			case <-ctx.Done():
			case <-in.turn:
			}
			continue
		}
		in.putBack(e, in.handle(ctx, e))
	}
}

// putBack is told what became of an event that was taken.
func (in *inbox) putBack(e *inboxEvent, handled bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if handled {
		in.events.remove(e)
	} else {
		e.event = ""
		in.events.setAside(e)
	}
	in.giveTurns()
	sooner := !handled && (in.nextTry.IsZero() || e.retryAt.Before(in.nextTry))
	if sooner || in.full && in.events.held < in.hook.options.Limits.QueuedEvents {
		notify(in.wake)
	}
}

// mayWait says whether one more event may wait for its key, and counts it if not.
func (in *inbox) mayWait(e *inboxEvent) bool {
	limits := in.hook.options.Limits
	in.mu.Lock()
	defer in.mu.Unlock()
	return e.lacksKey || in.events.keysOfSender[e.sender] < limits.WaitingPerSender &&
		(in.events.keysOfRoom[e.roomID] < limits.WaitingPerRoom || in.events.keysOfPair[roomSender{e.roomID, e.sender}] < waitingAnyway)
}

// mayBeLate says whether one more event may be kept for a key that comes late, and counts it if so.
func (in *inbox) mayBeLate(e *inboxEvent) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	switch {
	case e.told: // it is counted already
	case in.lateOf[e.sender] >= in.hook.options.Limits.LatePerSender:
		return false
	default:
		in.lateOf[e.sender]++
	}
	return true
}

// noLongerLate takes an event off the count whose key has come after all.
func (in *inbox) noLongerLate(e *inboxEvent) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.lateOf[e.sender]--; in.lateOf[e.sender] <= 0 {
		delete(in.lateOf, e.sender)
	}
}

func (in *inbox) lengths() (held, waiting int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.events.held, len(in.events.waiting)
}

// handle judges the event and hands it on. It says no to an event that has to wait.
func (in *inbox) handle(ctx context.Context, e *inboxEvent) bool {
	h := in.hook
	log := zerolog.Ctx(ctx).With().Stringer("room_id", e.roomID).Stringer("event_id", e.eventID).Logger()
	ctx = log.WithContext(ctx)
	keysBefore := in.watch(e)
	evt, err := in.read(ctx, e)
	if err != nil && ctx.Err() == nil {
		log.Err(err).Msg("Failed to read an event, trying again")
	}
	if err != nil {
		e.retryAt = h.clock().Add(flushRetry)
		return false
	}
	if evt == nil {
		return true
	}
	log = log.With().Stringer("sender", evt.Sender).Logger()
	ctx = log.WithContext(ctx)
	judged, verdict, wait, err := h.judge(ctx, e, evt)
	if err == nil && wait == 0 {
		// The message index has to be known for good before anybody acts on the message.
		err = in.flushBefore(ctx, verdict)
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
		faultpoint.Reach("judged")
		h.dispatch(ctx, judged)
		faultpoint.Reach("handled")
	}
	if ctx.Err() != nil {
		// The handler was cut short. It gets the event again.
		return false
	}
	if !e.told || !late {
		h.counters.events.Add(1)
	}
	in.unwritten.Add(1)
	in.settle(ctx, e, verdict, keysBefore)
	return true
}

// read gives the event, or nothing if there is nothing to hand on any more.
func (in *inbox) read(ctx context.Context, e *inboxEvent) (*event.Event, error) {
	h, text := in.hook, e.event
	if text == "" {
		var err error
		if text, err = h.store.inboxText(ctx, e.eventID); err == nil && text == "" {
			in.unwatch(e)
		}
		if text == "" {
			return nil, err
		}
	}
	evt, err := e.parse(text)
	if err != nil {
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Ignoring an event that cannot be parsed")
		in.unwatch(e)
		h.uow.stage(func(ctx context.Context) error { return h.store.markHandled(ctx, e.eventID) })
		return nil, nil
	}
	return evt, nil
}

// flushBefore makes what was learnt by decrypting durable. What was not decrypted has time: a transaction for each would be dear.
func (in *inbox) flushBefore(ctx context.Context, verdict Verdict) error {
	if verdict.undecrypted() && in.unwritten.Load() < unwrittenAtMost {
		return nil
	}
	in.unwritten.Store(0)
	return in.hook.uow.flush(ctx)
}

// settle notes that an event was handled, or keeps it in case that its key comes after all.
func (in *inbox) settle(ctx context.Context, e *inboxEvent, verdict Verdict, keysBefore int) {
	h := in.hook
	late := verdict.mayComeLate()
	if late && in.mayBeLate(e) {
		h.uow.stage(func(ctx context.Context) error { return h.keepLate(ctx, e, verdict, keysBefore) })
		return
	}
	if late {
		h.counters.reach(LimitLate)
		zerolog.Ctx(ctx).Info().Msg("Forgetting an event without a key: its sender has as many as are kept")
	}
	if e.told {
		in.noLongerLate(e)
	}
	in.unwatch(e)
	h.uow.stage(func(ctx context.Context) error { return h.store.markHandled(ctx, e.eventID) })
}

// keepLate keeps an event until its key comes after all. If it has come since the event was judged, it is judged again at once.
func (h *Hook) keepLate(ctx context.Context, e *inboxEvent, verdict Verdict, keysBefore int) error {
	if err := h.store.markLate(ctx, e.eventID, verdict.SessionID); err != nil {
		return err
	}
	came := h.inbox.unwatch(e) != keysBefore
	if !came && verdict.Reason != ReasonUnknownIndex {
		// It may have become durable while the event was judged, and not have been there before.
		current, err := h.store.holder(ctx, h.uow.AccountID, verdict.SessionID)
		if err != nil {
			return err
		}
		came = current != nil && current.roomID == e.roomID
	}
	if !came {
		return nil
	}
	return h.store.wakeLate(ctx, verdict.SessionID, h.inbox.nextSeq)
}

// watch has the keys counted that come for an event's session from now on.
func (in *inbox) watch(e *inboxEvent) (keysBefore int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.events.watch(e)
	return e.keysCame
}

// unwatch ends that, and gives how many have come.
func (in *inbox) unwatch(e *inboxEvent) (keysNow int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.events.unwatch(e)
	return e.keysCame
}

// wakeLate has the events looked at again that wait for a key of the session. It is part of storing the key.
func (h *Hook) wakeLate(ctx context.Context, sessionID id.SessionID) error {
	h.inbox.keys.Add(1)
	h.inbox.mu.Lock()
	h.inbox.events.stirIn(sessionID)
	h.inbox.mu.Unlock()
	if foresightOf(ctx).unawaited.has(sessionID) {
		return nil
	}
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

func (e *inboxEvent) parse(text string) (*event.Event, error) {
	var evt event.Event
	if err := json.Unmarshal([]byte(text), &evt); err != nil {
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
