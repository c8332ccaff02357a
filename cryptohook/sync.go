package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
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
	// failures counts failed /syncs in a row, refusals those that the homeserver called wrong.
	failures, refusals int
	// positionLost says that the homeserver does not know any more what was synced.
	positionLost bool
	filterID     string
}

var (
	_ mautrix.ExtensibleSyncer   = (*syncer)(nil)
	_ mautrix.DispatchableSyncer = (*syncer)(nil)
)

// sync syncs until the context ends, or syncing fails for good.
func (s *syncer) sync(ctx context.Context) error {
	for {
		err := s.hook.client.SyncWithContext(ctx)
		switch {
		case errors.Is(err, errPositionLost):
			s.losePosition(err)
		case errors.Is(err, errNoPosition):
			wait, err := s.OnFailedSync(nil, err)
			if err == nil {
				err = await(ctx, wait)
			}
			if err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// ProcessResponse implements [mautrix.Syncer]. An error ends syncing: the unit of work is broken, or the context ended.
func (s *syncer) ProcessResponse(ctx context.Context, resp *mautrix.RespSync, since string) error {
	h := s.hook
	if resp.NextBatch == "" {
		// Without it the next /sync would be the first: what comes until then would be taken for history.
		return errNoPosition
	}
	dropNulls(resp)
	if s.failures > 0 {
		// Whatever became of our own device meanwhile, its change may not be told any more.
		h.resolver.ask(h.client.UserID)
	}
	s.failures, s.refusals = 0, 0
	if s.positionLost {
		h.stageAllOutdated()
	}
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
	h.counters.syncedAt.Store(h.clock().UnixMilli())
	h.unlockKept(true)
	h.tellCommitted()
	if s.positionLost {
		s.positionLost = false
		h.askAllOutdated(ctx)
	}
	if len(changed) > 0 { // mautrix does not ask PostgreSQL about nobody in a way that it understands
		if tracked, err := h.uow.FilterTrackedUsers(ctx, changed); err != nil {
			h.log.Err(err).Msg("Failed to look up which changed device lists matter")
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
	for wait := firstStorageRetry; ; wait = min(2*wait, maxStorageRetry) {
		err := h.uow.flush(ctx)
		if err == nil || errors.Is(err, ErrUnitOfWorkBroken) || errors.Is(err, ErrNotOwner) {
			return err
		}
		h.log.Err(err).Msg("Failed to store what the server sent, trying again; nothing is lost")
		if err = await(ctx, wait); err != nil {
			return err
		}
	}
}

// dropNulls takes the events and rooms out of a /sync answer that are the JSON null. Nobody looks for those: they would end the process,
// again and again.
func dropNulls(resp *mautrix.RespSync) {
	lists := []*mautrix.SyncEventsList{&resp.AccountData, &resp.Presence, &resp.ToDevice}
	maps.DeleteFunc(resp.Rooms.Join, func(_ id.RoomID, room *mautrix.SyncJoinedRoom) bool { return room == nil })
	maps.DeleteFunc(resp.Rooms.Leave, func(_ id.RoomID, room *mautrix.SyncLeftRoom) bool { return room == nil })
	maps.DeleteFunc(resp.Rooms.Invite, func(_ id.RoomID, room *mautrix.SyncInvitedRoom) bool { return room == nil })
	maps.DeleteFunc(resp.Rooms.Knock, func(_ id.RoomID, room *mautrix.SyncKnockedRoom) bool { return room == nil })
	for _, room := range resp.Rooms.Join {
		lists = append(lists, &room.State, room.StateAfter, &room.Timeline.SyncEventsList, &room.Ephemeral, &room.AccountData, &room.Sticky)
	}
	for _, room := range resp.Rooms.Leave {
		lists = append(lists, &room.State, room.StateAfter, &room.Timeline.SyncEventsList)
	}
	for _, room := range resp.Rooms.Invite {
		lists = append(lists, &room.State)
	}
	for _, room := range resp.Rooms.Knock {
		lists = append(lists, &room.State)
	}
	for _, list := range lists {
		if list != nil {
			list.Events = withoutNulls(list.Events)
		}
	}
}

func withoutNulls(events []*event.Event) []*event.Event {
	return slices.DeleteFunc(events, func(evt *event.Event) bool { return evt == nil })
}

// receive works through the to-device events without touching the network. It leaves in the response what handlers may see, and
// returns what has to wait until the unit of work is durable, since it may send something.
func (h *Hook) receive(ctx context.Context, resp *mautrix.RespSync) (postponed []*event.Event, err error) {
	var left []*event.Event
	receiving := newReceiving(h)
	unreadable := make([]error, len(resp.ToDevice.Events))
	sideBySide(len(resp.ToDevice.Events), func(i int) {
		evt := resp.ToDevice.Events[i]
		evt.Type.Class = event.ToDeviceEventType
		if unreadable[i] = evt.Content.ParseRaw(evt.Type); unreadable[i] != nil {
			evt.Content.Parsed = nil // what could be read of it is not to be taken for all
		}
	})
	if err = receiving.lookUpHashes(ctx, resp.ToDevice.Events); err == nil {
		err = receiving.lookUpSenders(ctx)
	}
	if err != nil {
		return nil, h.uow.breakWith(err)
	}
	taken := 0
	for i, evt := range resp.ToDevice.Events {
		if i < taken {
			continue
		}
		together, err := h.receiveTogether(ctx, resp.ToDevice.Events[i:], receiving)
		if err != nil {
			return nil, h.uow.breakWith(err)
		} else if together > 0 {
			taken = i + together
			continue
		}
		log := h.log.With().Stringer("sender", evt.Sender).Str("to_device_type", evt.Type.Type).Logger()
		ctx := log.WithContext(ctx)
		if !h.isForUs(evt) {
			log.Warn().Stringer("to_user_id", evt.ToUserID).Stringer("to_device_id", evt.ToDeviceID).Msg("Ignoring a to-device event for another device")
			continue
		}
		if err := unreadable[i]; err != nil && !errors.Is(err, event.ErrUnsupportedContentType) {
			log.Warn().Err(err).Msg("Ignoring a to-device event that cannot be parsed")
			continue
		}
		switch content := evt.Content.Parsed.(type) {
		case *event.EncryptedEventContent:
			passedOn, err := h.receiveEncrypted(ctx, evt, receiving)
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

// longestWithheldCode is more than any code that the specification has, in bytes.
const longestWithheldCode = 100

// receiveWithheld notes why a sender does not share a session with us. Such a notice is not encrypted: it explains a missing
// key and never outweighs one, so it is kept apart from mautrix's, where it would stand in the session's place.
func (h *Hook) receiveWithheld(ctx context.Context, sender id.UserID, content *event.RoomKeyWithheldEventContent) {
	zerolog.Ctx(ctx).Debug().Stringer("session_id", content.SessionID).Str("code", string(content.Code)).Msg("A room key is withheld from us")
	if content.SessionID == "" && content.Code != event.RoomKeyWithheldNoOlmSession {
		return
	}
	if content.SessionID != "" && !isKey(content.SessionID.String()) || len(content.Code) > longestWithheldCode {
		zerolog.Ctx(ctx).Warn().Msg("Ignoring a notice about a room key that cannot be one")
		return
	}
	now := h.clock()
	h.uow.stage(func(ctx context.Context) error {
		return h.store.putWithheld(ctx, content.SessionID, sender, content.Code, now)
	})
	h.inbox.withheld(sender, content.SessionID)
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
		missed, err := s.fetchGap(ctx, roomID, room, since)
		if err != nil {
			return err
		}
		timeline := sinceJoining(h.client.UserID, append(missed, room.Timeline.Events...))
		// The first /sync of a database shows history that a former database may have answered.
		wanted := timeline
		if since == "" {
			wanted = nil
		}
		if s.positionLost {
			if wanted, _, err = h.afterKnown(context.WithoutCancel(ctx), timeline); err != nil {
				return h.uow.breakWith(err)
			}
		}
		state := make([]*event.Event, 0, len(room.Timeline.Events))
		for i, evt := range timeline {
			if evt.StateKey != nil {
				// The state block tells already what the gap did to the state.
				if kept := h.dropDowngrades(ctx, []*event.Event{evt}, &encrypted); len(timeline)-i <= len(room.Timeline.Events) {
					state = append(state, kept...)
				}
				continue
			}
			if len(timeline)-i > len(wanted) {
				h.noteHistory(roomID, encrypted, evt.ID, now)
				continue
			}
			if h.isOwnEcho(evt) {
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
// events only. It gives up after 1,000 events a room, or when the server refuses to give them, and says so. An error is the end of the
// context or of the token: the next process fetches the gap.
func (s *syncer) fetchGap(ctx context.Context, roomID id.RoomID, room *mautrix.SyncJoinedRoom, since string) (missed []*event.Event, err error) {
	h := s.hook
	if !room.Timeline.Limited || since == "" && !s.positionLost {
		return nil, nil
	}
	if begins, err := s.beginsIn(ctx, room.Timeline.Events); begins || err != nil {
		return nil, err
	}
	log := h.log.With().Stringer("room_id", roomID).Logger()
	ctx = log.WithContext(ctx)
	from := room.Timeline.PrevBatch
	for range gapPages {
		page, err := h.messages(ctx, roomID, from, since)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		} else if errors.Is(err, mautrix.MUnknownToken) || errors.Is(err, mautrix.MMissingToken) {
			return nil, err
		} else if err != nil {
			log.Err(err).Int("found", len(missed)).Msg("The homeserver does not give all messages that came during a long pause; some may stay unanswered")
			return missed, nil
		}
		page.Chunk = withoutNulls(page.Chunk)
		slices.Reverse(page.Chunk)
		missed = append(page.Chunk, missed...)
		begins, err := s.beginsIn(ctx, page.Chunk)
		if err != nil {
			return nil, err
		}
		if page.End == "" || len(page.Chunk) == 0 || begins {
			return missed, nil
		}
		from = page.End
	}
	log.Warn().Int("found", len(missed)).Msg("Too many messages came during a long pause; the oldest stay unanswered")
	return missed, nil
}

// beginsIn says that nothing before these events is missing.
func (s *syncer) beginsIn(ctx context.Context, events []*event.Event) (bool, error) {
	if joinedIn(s.hook.client.UserID, events) >= 0 {
		return true, nil
	}
	if !s.positionLost {
		return false, nil
	}
	_, found, err := s.hook.afterKnown(context.WithoutCancel(ctx), events)
	if err != nil {
		err = s.hook.uow.breakWith(err)
	}
	return found, err
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
	if s.isPositionLost(err) {
		return 0, fmt.Errorf("%w: %w", errPositionLost, err)
	}
	wait := min(firstSyncRetry<<min(s.failures, 10), maxSyncRetry)
	s.failures++
	s.hook.counters.failedSyncs.Add(1)
	s.hook.log.Warn().Err(err).Dur("retry_in", wait).Msg("Failed to sync")
	s.hook.transport.lenientSync.Store(true)
	return wait, nil
}

// tokenStore is the client's sync store. mautrix saves the token before it processes a /sync; here it is saved with what that
// /sync brought, by the unit of work.
type tokenStore struct{ hook *Hook }

var _ mautrix.SyncStore = tokenStore{}

func (t tokenStore) SaveFilterID(_ context.Context, _ id.UserID, filterID string) error {
	t.hook.syncer.filterID = filterID
	return nil
}

func (t tokenStore) LoadFilterID(context.Context, id.UserID) (string, error) {
	return t.hook.syncer.filterID, nil
}

func (tokenStore) SaveNextBatch(context.Context, id.UserID, string) error { return nil }
func (t tokenStore) LoadNextBatch(ctx context.Context, _ id.UserID) (string, error) {
	if t.hook.syncer.positionLost {
		return "", nil
	}
	var token string
	err := t.hook.store.QueryRow(ctx, getTokenQuery, t.hook.uow.AccountID).Scan(&token)
	return token, ignoreNoRows(err)
}
