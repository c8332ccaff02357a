package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/internal/faultpoint"
)

// syncer takes over the client's /sync processing. Handlers are registered on it as on mautrix's own syncer.
//
// One /sync is one unit of work: device-list changes, to-device events, the room events that wait for their handlers, and the
// sync token are committed together. Handlers of room events run after that, from the inbox; a crash anywhere means either that
// the homeserver delivers again, or that the inbox does.
type syncer struct {
	*mautrix.DefaultSyncer
	hook *Hook
	// failures counts failed /syncs in a row.
	failures int
}

var (
	_ mautrix.ExtensibleSyncer   = (*syncer)(nil)
	_ mautrix.DispatchableSyncer = (*syncer)(nil)
)

// ProcessResponse implements [mautrix.Syncer]. An error ends syncing: the unit of work is broken, or the context ended.
func (s *syncer) ProcessResponse(ctx context.Context, resp *mautrix.RespSync, since string) error {
	h := s.hook
	s.failures = 0
	defer h.unlockKept(false)
	changed := resp.DeviceLists.Changed
	if len(changed) > 0 {
		h.uow.stage(func(ctx context.Context) error { return h.uow.MarkTrackedUsersOutdated(ctx, changed) })
	}
	// Receiving neither waits for anybody nor takes long: it is not to be cut short by the end of the context.
	postponed, err := h.receive(context.WithoutCancel(ctx), resp)
	if err != nil {
		return err
	}
	if err = s.takeRoomEvents(ctx, resp, since); err != nil {
		return err
	}
	faultpoint.Reach("received")
	// What is left goes to the handlers at once: state, invites, account data, and to-device events that are not ours.
	if err = s.DefaultSyncer.ProcessResponse(ctx, resp, since); err != nil {
		// A handler panicked. Delivering the same again would end the same way, for ever.
		h.log.Err(err).Msg("A handler failed; going on without it")
	}
	token := resp.NextBatch
	h.uow.stage(func(ctx context.Context) error { return h.uow.PutNextBatch(ctx, token) })
	if err = h.commit(ctx); err != nil {
		return err
	}
	faultpoint.Reach("synced")
	h.unlockKept(true)
	h.tellCommitted()
	if len(changed) > 0 { // mautrix does not ask PostgreSQL about nobody in a way that it understands
		if tracked, err := h.uow.FilterTrackedUsers(ctx, changed); err != nil {
			zerolog.Ctx(ctx).Err(err).Msg("Failed to look up which changed device lists matter")
		} else {
			h.resolver.ask(tracked...)
		}
	}
	h.inbox.signal()
	h.search.committed()
	h.bundles.signal()
	h.mach.MarkOlmHashSavePoint(ctx)
	h.mach.HandleOTKCounts(ctx, &resp.DeviceOTKCount)
	for _, evt := range postponed {
		h.background.Go(func() { h.mach.HandleToDeviceEvent(ctx, evt) })
	}
	return nil
}

// commit tries until the unit of work is durable. Only the end of the context, a broken unit of work, or the loss of the database is
// an error.
func (h *Hook) commit(ctx context.Context) error {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		err := h.uow.flush(ctx)
		if err == nil || errors.Is(err, ErrUnitOfWorkBroken) || errors.Is(err, ErrNotOwner) {
			return err
		}
		h.log.Err(err).Msg("Failed to store what the server sent, trying again; nothing is lost")
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// receive works through the to-device events without touching the network. It leaves in the response what handlers may see, and
// returns what has to wait until the unit of work is durable, since it may send something.
func (h *Hook) receive(ctx context.Context, resp *mautrix.RespSync) (postponed []*event.Event, err error) {
	var left []*event.Event
	for _, evt := range resp.ToDevice.Events {
		log := h.log.With().Stringer("sender", evt.Sender).Str("to_device_type", evt.Type.Type).Logger()
		ctx := log.WithContext(ctx)
		if evt.ToUserID != "" && (evt.ToUserID != h.client.UserID || evt.ToDeviceID != h.client.DeviceID) {
			log.Warn().Stringer("to_user_id", evt.ToUserID).Stringer("to_device_id", evt.ToDeviceID).Msg("Ignoring a to-device event for another device")
			continue
		}
		evt.Type.Class = event.ToDeviceEventType
		if err := evt.Content.ParseRaw(evt.Type); err != nil && !errors.Is(err, event.ErrUnsupportedContentType) {
			log.Warn().Err(err).Msg("Ignoring a to-device event that cannot be parsed")
			continue
		}
		switch content := evt.Content.Parsed.(type) {
		case *event.EncryptedEventContent:
			passedOn, err := h.receiveEncrypted(ctx, evt)
			if err != nil {
				return nil, h.uow.breakWith(err)
			}
			if passedOn != nil {
				left = append(left, passedOn)
			}
		case *event.RoomKeyWithheldEventContent:
			h.receiveWithheld(ctx, evt.Sender, content)
		case *event.RoomKeyRequestEventContent, *event.SecretRequestEventContent, *event.BeeperRoomKeyAckEventContent:
			postponed = append(postponed, evt)
		case *event.RoomKeyEventContent, *event.ForwardedRoomKeyEventContent, *event.SecretSendEventContent:
			log.Warn().Msg("Ignoring a to-device event that must be encrypted and is not")
		default:
			left = append(left, evt)
		}
	}
	resp.ToDevice.Events = left
	return postponed, nil
}

// receiveWithheld notes why a sender does not share a session with us. Such a notice is not encrypted: it explains a missing
// key and never outweighs one, so it is kept apart from mautrix's, where it would stand in the session's place.
func (h *Hook) receiveWithheld(ctx context.Context, sender id.UserID, content *event.RoomKeyWithheldEventContent) {
	zerolog.Ctx(ctx).Debug().Stringer("session_id", content.SessionID).Str("code", string(content.Code)).Msg("A room key is withheld from us")
	if content.SessionID == "" && content.Code != event.RoomKeyWithheldNoOlmSession {
		return
	}
	now := h.clock()
	h.uow.stage(func(ctx context.Context) error {
		return h.store.putWithheld(ctx, content.SessionID, sender, content.Code, now)
	})
}

// takeRoomEvents moves the room events that are messages from the response to the inbox, in the unit of work.
func (s *syncer) takeRoomEvents(ctx context.Context, resp *mautrix.RespSync, since string) error {
	h := s.hook
	now := h.clock()
	for roomID, room := range resp.Rooms.Join {
		encrypted, err := h.client.StateStore.IsEncrypted(context.WithoutCancel(ctx), roomID)
		if err != nil {
			return h.uow.breakWith(fmt.Errorf("failed to look up whether %s is encrypted: %w", roomID, err))
		}
		room.State.Events = h.dropDowngrades(ctx, room.State.Events, &encrypted)
		if room.StateAfter != nil {
			room.StateAfter.Events = h.dropDowngrades(ctx, room.StateAfter.Events, &encrypted)
		}
		missed, err := h.fetchGap(ctx, roomID, room, since)
		if err != nil {
			return err
		}
		timeline := sinceJoining(h.client.UserID, append(missed, room.Timeline.Events...))
		state := make([]*event.Event, 0, len(room.Timeline.Events))
		for i, evt := range timeline {
			if evt.StateKey != nil {
				// The state block tells already what the gap did to the state.
				if kept := h.dropDowngrades(ctx, []*event.Event{evt}, &encrypted); len(timeline)-i <= len(room.Timeline.Events) {
					state = append(state, kept...)
				}
				continue
			}
			// The first /sync of a database shows history that a former database may have answered.
			if since == "" || h.isOwnEcho(evt) {
				continue
			}
			if err = h.putInInbox(roomID, encrypted, evt, now); err != nil {
				zerolog.Ctx(ctx).Warn().Err(err).Stringer("event_id", evt.ID).Msg("Ignoring an event that cannot be stored")
			}
		}
		room.Timeline.Events = state
	}
	return nil
}

const (
	gapPage  = 100
	gapPages = 10
)

// fetchGap gets what a /sync left out between its timeline and the one before: after a long pause the server sends the newest
// events only. It gives up after 1,000 events a room, or when the server does not answer, and says so. The error is the context's
// end: the next process fetches the gap.
func (h *Hook) fetchGap(ctx context.Context, roomID id.RoomID, room *mautrix.SyncJoinedRoom, since string) (missed []*event.Event, err error) {
	if !room.Timeline.Limited || since == "" || joinedIn(h.client.UserID, room.Timeline.Events) >= 0 {
		return nil, nil
	}
	log := h.log.With().Stringer("room_id", roomID).Logger()
	from := room.Timeline.PrevBatch
	for range gapPages {
		page, err := h.client.Messages(ctx, roomID, from, since, mautrix.DirectionBackward, nil, gapPage)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		} else if err != nil {
			log.Err(err).Int("found", len(missed)).Msg("Failed to fetch all messages that came during a long pause; some may stay unanswered")
			return missed, nil
		}
		slices.Reverse(page.Chunk)
		missed = append(page.Chunk, missed...)
		if page.End == "" || len(page.Chunk) == 0 || joinedIn(h.client.UserID, page.Chunk) >= 0 {
			return missed, nil
		}
		from = page.End
	}
	log.Warn().Int("found", len(missed)).Msg("Too many messages came during a long pause; the oldest stay unanswered")
	return missed, nil
}

// dropDowngrades leaves out m.room.encryption events that would switch encryption off: that is not possible in Matrix, and
// mautrix's state store would believe it.
func (h *Hook) dropDowngrades(ctx context.Context, events []*event.Event, encrypted *bool) []*event.Event {
	kept := events[:0]
	for _, evt := range events {
		if evt.Type.Type == event.StateEncryption.Type && evt.GetStateKey() == "" {
			var content event.EncryptionEventContent
			if json.Unmarshal(evt.Content.VeryRaw, &content) == nil && content.Algorithm == id.AlgorithmMegolmV1 {
				*encrypted = true
			} else if *encrypted {
				zerolog.Ctx(ctx).Warn().Stringer("event_id", evt.ID).Stringer("sender", evt.Sender).Msg("Ignoring an attempt to switch encryption off")
				continue
			}
		}
		kept = append(kept, evt)
	}
	return kept
}

// sinceJoining gives the part of a timeline from our own joining on, state events before it included.
func sinceJoining(userID id.UserID, timeline []*event.Event) []*event.Event {
	joined := joinedIn(userID, timeline)
	if joined < 0 {
		return timeline
	}
	var since []*event.Event
	for i, evt := range timeline {
		if i >= joined || evt.StateKey != nil {
			since = append(since, evt)
		}
	}
	return since
}

// joinedIn gives the place in the timeline at which we joined the room, or -1.
func joinedIn(userID id.UserID, timeline []*event.Event) int {
	for i := len(timeline) - 1; i >= 0; i-- {
		evt := timeline[i]
		if evt.Type.Type == event.StateMember.Type && evt.GetStateKey() == userID.String() &&
			membership(&evt.Content) == event.MembershipJoin && membership(evt.Unsigned.PrevContent) != event.MembershipJoin {
			return i
		}
	}
	return -1
}

func membership(content *event.Content) event.Membership {
	if content == nil {
		return ""
	}
	word, _ := content.Raw["membership"].(string)
	return event.Membership(word)
}

// isOwnEcho says that this very client sent the event: only then does the server tell the transaction ID.
func (h *Hook) isOwnEcho(evt *event.Event) bool {
	return evt.Sender == h.client.UserID && evt.Unsigned.TransactionID != ""
}

func (h *Hook) putInInbox(roomID id.RoomID, encrypted bool, evt *event.Event, now time.Time) error {
	whole := *evt
	whole.RoomID = roomID
	whole.Content = event.Content{VeryRaw: evt.Content.VeryRaw}
	raw, err := json.Marshal(&whole)
	if err != nil {
		return fmt.Errorf("failed to marshal the event: %w", err)
	}
	stored := &inboxEvent{eventID: evt.ID, seq: h.inbox.nextSeq(), roomID: roomID, roomEncrypted: encrypted, receivedAt: now, event: string(raw)}
	h.uow.stage(func(ctx context.Context) error { return h.store.putInboxEvent(ctx, stored) })
	return nil
}

const (
	firstSyncRetry = time.Second
	maxSyncRetry   = 30 * time.Second
)

// OnFailedSync implements [mautrix.Syncer]. A /sync answer that cannot be parsed is asked for again, leniently.
func (s *syncer) OnFailedSync(_ *mautrix.RespSync, err error) (time.Duration, error) {
	if errors.Is(err, mautrix.MUnknownToken) || errors.Is(err, mautrix.MMissingToken) {
		return 0, err
	}
	wait := min(firstSyncRetry<<min(s.failures, 10), maxSyncRetry)
	s.failures++
	s.hook.log.Warn().Err(err).Dur("retry_in", wait).Msg("Failed to sync")
	s.hook.transport.lenientSync.Store(true)
	return wait, nil
}

// tokenStore is the client's sync store. mautrix saves the token before it processes a /sync; here it is saved with what that
// /sync brought, by the unit of work.
type tokenStore struct{ hook *Hook }

var _ mautrix.SyncStore = tokenStore{}

func (tokenStore) SaveFilterID(context.Context, id.UserID, string) error   { return nil }
func (tokenStore) LoadFilterID(context.Context, id.UserID) (string, error) { return "", nil }
func (tokenStore) SaveNextBatch(context.Context, id.UserID, string) error  { return nil }
func (t tokenStore) LoadNextBatch(ctx context.Context, _ id.UserID) (string, error) {
	var token string
	err := t.hook.store.QueryRow(ctx, getTokenQuery, t.hook.uow.AccountID).Scan(&token)
	return token, ignoreNoRows(err)
}
