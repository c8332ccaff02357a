package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// inbox hands room events to their handlers: decrypted, judged, in the order of each room, at least once. An event whose key
// or whose sender's keys are still on their way is set aside and does not hold up those after it. What the process did not get
// to, the next one does.
type inbox struct {
	hook *Hook
	wake chan struct{}
	// lastSeq numbers the events; only the syncing goroutine touches it.
	lastSeq int64

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
	roomsAtOnce  = 8
	heldAtMost   = 1000
	loadAtOnce   = 200
	keepHandled  = 7 * 24 * time.Hour
	pruneEvery   = time.Hour
	identityWait = 5 * time.Second
	flushRetry   = time.Second
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
	attach(judged, verdict)
	h.dispatch(ctx, judged)
	if ctx.Err() != nil {
		// The handler was cut short. It gets the event again.
		return false
	}
	h.uow.stage(func(ctx context.Context) error { return h.store.markHandled(ctx, e.eventID) })
	return true
}

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

// judge gives the event for the handler, decrypted if it can and may be, with its verdict; or how long to wait at most.
func (h *Hook) judge(ctx context.Context, e *inboxEvent, evt *event.Event) (_ *event.Event, v Verdict, wait time.Duration, err error) {
	switch {
	case evt.Type != event.EventEncrypted && e.roomEncrypted:
		v.Code = CodeSentInClear
	case evt.Type != event.EventEncrypted:
		v.Code = CodeNotEncrypted
	case evt.Content.Parsed == nil:
		v.Code, v.Reason = CodeUnableToDecrypt, ReasonMalformed
	default:
		return h.judgeEncrypted(ctx, e, evt)
	}
	v.EventID = e.eventID
	return evt, v, 0, nil
}

func (h *Hook) judgeEncrypted(ctx context.Context, e *inboxEvent, evt *event.Event) (_ *event.Event, v Verdict, wait time.Duration, err error) {
	sessionID := evt.Content.AsEncrypted().SessionID
	claims, err := h.store.claims(ctx, sessionID)
	if err != nil {
		return nil, v, 0, err
	}
	claims = livingClaims(claims)
	now := h.clock()
	awaits, err := h.awaitsKeys(ctx, claims)
	if err != nil {
		return nil, v, 0, err
	}
	// Whoever claims the session again and again does not hold its messages up.
	left := min(identityWait-now.Sub(e.complete(claims)), h.options.KeyWait+identityWait-now.Sub(e.receivedAt))
	if awaits && left > 0 {
		return nil, v, left, nil
	}
	var identity *Identity
	if len(claims) > 0 {
		if identity, err = h.store.identity(ctx, claims[0].Sender); err != nil {
			return nil, v, 0, err
		}
	}
	v = h.anchor().verdict(evt.Sender, sessionID, claims, identity)
	v.EventID = e.eventID
	v.Outdated = awaits
	if v.Code == CodeSessionRejected || v.Code == CodeMismatchedSender {
		// What somebody else sends on is not decrypted: it must not use up the message index of the original.
		v.ContentWithheld = true
		return evt, v, 0, nil
	}
	if v.Code == CodeSessionConflict {
		ctx = withDisputed(ctx)
	}
	decrypted, err := h.decrypt(ctx, evt)
	if err != nil {
		code, reason, final, known := classify(err)
		if !known {
			return nil, v, 0, err
		}
		if reason == ReasonUnknownSession {
			withheld, err := h.store.withheld(ctx, sessionID, evt.Sender)
			if err != nil {
				return nil, v, 0, err
			}
			if withheld != "" {
				reason, final = string(withheld), finalWithheld[withheld]
			}
		}
		if left := h.options.KeyWait - now.Sub(e.receivedAt); !final && left > 0 {
			return nil, v, left, nil
		}
		zerolog.Ctx(ctx).Debug().Err(err).Msg("Failed to decrypt an event")
		v.Code, v.Reason = code, reason
		if len(claims) == 0 {
			v.State, v.Legacy = "", false
		}
		return evt, v, 0, nil
	}
	if !h.options.Requirement.allows(v) {
		v.ContentWithheld = true
		return evt, v, 0, nil
	}
	decrypted.Mautrix.EventSource |= event.SourceDecrypted
	return decrypted, v, 0, nil
}

var errUnbearable = errors.New("mautrix cannot bear the payload")

// decrypt shields us from mautrix 0.31, which panics at a Megolm payload that is the JSON null: a member could end the process
// with one message, again and again.
func (h *Hook) decrypt(ctx context.Context, evt *event.Event) (decrypted *event.Event, err error) {
	defer func() {
		if reason := recover(); reason != nil {
			err = fmt.Errorf("%w: %v", errUnbearable, reason)
		}
	}()
	return h.mach.DecryptMegolmEvent(withDecrypting(ctx), evt)
}

// complete is when the event and its key were both there: the time that a sender's keys may take counts from then.
func (e *inboxEvent) complete(claims []*SenderData) time.Time {
	complete := e.receivedAt
	for _, claim := range claims {
		if claim.ReceivedAt.After(complete) {
			complete = claim.ReceivedAt
		}
	}
	return complete
}

// awaitsKeys says that the sender's keys are being asked for, or were and nobody answered, so that the verdict may change at once.
func (h *Hook) awaitsKeys(ctx context.Context, claims []*SenderData) (bool, error) {
	for _, claim := range claims {
		if claim.awaitsFirstLook() || h.resolver.pending(claim.Sender) {
			return true, nil
		}
		if claim.Sender == "" || claim.State.proven() {
			continue
		}
		if current, err := h.store.deviceListCurrent(ctx, claim.Sender); err != nil || !current {
			return true, err
		}
	}
	return false, nil
}

// finalWithheld are the codes by which a sender says that the key will not come.
// https://spec.matrix.org/v1.16/client-server-api/#mroom_keywithheld
var finalWithheld = map[event.RoomKeyWithheldCode]bool{
	event.RoomKeyWithheldBlacklisted:  true,
	event.RoomKeyWithheldUnverified:   true,
	event.RoomKeyWithheldUnauthorized: true,
}

// classify says what a failed decryption means: a code and its reason, and whether a key that comes later cannot change it.
// Errors that it does not know are the store's.
func classify(err error) (code Code, reason string, final, known bool) {
	switch {
	case errors.Is(err, crypto.ErrNoSessionFound):
		return CodeUnableToDecrypt, ReasonUnknownSession, false, true
	case errors.Is(err, crypto.ErrGroupSessionWithheld):
		// mautrix has redacted the key, for example since it expired.
		return CodeUnableToDecrypt, ReasonKeyDeleted, true, true
	case errors.Is(err, crypto.ErrDuplicateMessageIndex):
		return CodeMismatchedSender, ReasonReplayed, true, true
	case errors.Is(err, olm.ErrUnknownMessageIndex):
		return CodeUnableToDecrypt, ReasonUnknownIndex, false, true
	case errors.Is(err, crypto.ErrWrongRoom):
		return CodeUnableToDecrypt, ReasonWrongRoom, true, true
	case errors.Is(err, crypto.ErrUnsupportedAlgorithm):
		return CodeUnableToDecrypt, ReasonUnsupportedAlgorithm, true, true
	case errors.Is(err, errStorage):
		return "", "", false, false
	default:
		return CodeUnableToDecrypt, ReasonMalformed, true, true
	}
}
