package cryptohook

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/internal/faultpoint"
)

// How room keys are intercepted: HandleEncryptedEvent copies the type class of the outer event onto the decrypted one before it
// looks the type up in event.TypeMap, and hands back what it does not find there. Under this class, which nobody else uses, it
// finds only the types that we leave to mautrix. So the hook gets m.room_key (and everything that mautrix would drop) with the
// Olm event around it, and no other machine in the process sees a difference.
const interceptedClass event.TypeClass = 0x7374

func init() {
	// Their handlers neither send anything nor take part in a decision about trust.
	for _, left := range []event.Type{event.ToDeviceDummy, event.ToDeviceSecretSend} {
		event.TypeMap[event.Type{Type: left.Type, Class: interceptedClass}] = event.TypeMap[left]
	}
}

// The rotation settings that apply where a room does not say otherwise.
// https://spec.matrix.org/v1.16/client-server-api/#mroomencryption
const (
	defaultRotationPeriod   = 7 * 24 * time.Hour
	defaultRotationMessages = 100
)

// Faults of room keys. They are logged once each; the key is skipped.
var (
	errNotMegolm         = errors.New("the room key is not for " + string(id.AlgorithmMegolmV1))
	errNoClaimedKey      = errors.New("the Olm message claims no ed25519 key")
	errSessionIDMismatch = errors.New("the session ID does not match the session key")
	errUnconnected       = errors.New("the same device has shared this session for another room, or under another ed25519 key")
)

// receiveEncrypted decrypts one m.room.encrypted to-device event within the unit of work. It returns what was in it if that is
// neither a room key nor handled by mautrix. The error is one of the store's.
func (h *Hook) receiveEncrypted(ctx context.Context, evt *event.Event, r *receiving) (*event.Event, error) {
	if size := len(evt.Content.VeryRaw); size > h.options.Limits.ToDeviceBytes {
		h.counters.reach(LimitToDevice)
		zerolog.Ctx(ctx).Warn().Int("bytes", size).Msg("Ignoring an encrypted to-device event that is larger than any key")
		return nil, nil
	}
	defer h.uow.endMessage()
	receiving := r.context(ctx)
	intercepted := *evt
	intercepted.Type.Class = interceptedClass
	decrypted := h.handleEncrypted(receiving, &intercepted)
	if err := h.uow.failure(); err != nil {
		return nil, err
	}
	if decrypted == nil {
		return nil, nil
	}
	log := zerolog.Ctx(ctx).With().
		Stringer("sender", decrypted.Sender).
		Stringer("sender_key", decrypted.SenderKey).
		Logger()
	ctx, receiving = log.WithContext(ctx), log.WithContext(receiving)
	switch decrypted.Type.Type {
	case event.ToDeviceRoomKey.Type:
		return nil, h.receiveRoomKey(receiving, decrypted)
	case event.ToDeviceForwardedRoomKey.Type:
		return nil, h.receiveForwarded(receiving, decrypted)
	case bundleType, unstableBundleType:
		h.receiveBundle(receiving, decrypted)
		return nil, nil
	}
	passedOn := &event.Event{
		Sender:     decrypted.Sender,
		Type:       event.Type{Type: decrypted.Type.Type, Class: event.ToDeviceEventType},
		ToUserID:   evt.ToUserID,
		ToDeviceID: evt.ToDeviceID,
		Content:    event.Content{VeryRaw: decrypted.Content.VeryRaw, Raw: decrypted.Content.Raw},
	}
	passedOn.Mautrix.WasEncrypted = true
	return passedOn, nil
}

// handleEncrypted lets mautrix decrypt the event. A panic there costs one event: the same event would be delivered for ever.
func (h *Hook) handleEncrypted(ctx context.Context, evt *event.Event) (decrypted *crypto.DecryptedOlmEvent) {
	defer func() {
		if reason := recover(); reason != nil {
			zerolog.Ctx(ctx).Error().Any("reason", reason).Bytes("stack", debug.Stack()).Msg("Ignoring a to-device event that mautrix cannot bear")
			decrypted = nil
		}
	}()
	return h.mach.HandleEncryptedEvent(ctx, evt)
}

// arrivedKey is an m.room_key that was read.
type arrivedKey struct {
	olmEvent *crypto.DecryptedOlmEvent
	session  *crypto.InboundGroupSession
	content  *event.RoomKeyEventContent
	// embedded are the sender_device_keys of the Olm message, if it has them; embeddedKeys is what is in them, nil if nobody has read it yet.
	embedded     json.RawMessage
	embeddedKeys *mautrix.DeviceKeys
	// fault is why it is skipped.
	fault error
}

// receiveRoomKey stores the Megolm session of an m.room_key together with who sent it. It does what mautrix's receiveRoomKey
// does, and derives the sender by the steps A–J on the way.
func (h *Hook) receiveRoomKey(ctx context.Context, olmEvent *crypto.DecryptedOlmEvent) error {
	arrived := &arrivedKey{olmEvent: olmEvent}
	arrived.readDevice()
	arrived.read()
	if err := receivingOf(ctx).lookUpSessions(ctx, arrived); err != nil {
		return err
	}
	return h.takeRoomKey(ctx, arrived)
}

// takeRoomKey is receiveRoomKey for a key that was read.
func (h *Hook) takeRoomKey(ctx context.Context, arrived *arrivedKey) error {
	faultpoint.Reach("decrypted")
	log := zerolog.Ctx(ctx)
	if arrived.fault != nil {
		log.Warn().Err(arrived.fault).Msg("Skipping a room key that is not valid")
		return nil
	}
	session, content := arrived.session, arrived.content
	maxAge, maxMessages := h.rotation(ctx, content)
	session.MaxAge, session.MaxMessages = maxAge.Milliseconds(), maxMessages
	logger := log.With().Stringer("room_id", session.RoomID).Stringer("session_id", session.ID()).Logger()
	log, ctx = &logger, logger.WithContext(ctx)

	guard := h.sessions.TryLock(session.ID())
	known := h.knowledge()
	sender, err := h.deriveSender(ctx, arrived, guard != nil, receivingOf(ctx))
	if err != nil {
		guard.Unlock()
		return err
	}
	h.keepUntilCommit(guard, sender)
	current, err := h.holderOf(ctx, session.ID())
	if err != nil {
		return err
	}
	ours := current == nil || current.senderKey == session.SenderKey
	if ours && current != nil && (current.roomID != session.RoomID || current.signingKey != session.SigningKey) {
		log.Warn().Err(errUnconnected).Stringer("other_room_id", current.roomID).Msg("Skipping a room key")
		return nil
	}
	kept := session
	if !ours {
		log.Error().Stringer("other_sender_key", current.senderKey).Msg("Two devices claim the same session: keeping the first one's, and both claims")
		h.uow.stage(func(ctx context.Context) error { return h.store.claimForHolder(ctx, session.ID(), current) })
		// The key is signed with the session's own: it is genuine, whoever made it. What it opens earlier is not to be lost.
		merged := *session
		merged.RoomID, merged.SenderKey, merged.SigningKey = current.roomID, current.senderKey, current.signingKey
		kept = &merged
	}
	if sender.State != StateRejected {
		if ours && h.mach.DeletePreviousKeysOnReceive && !content.IsScheduled {
			if _, err = h.uow.RedactGroupSessions(ctx, session.RoomID, session.SenderKey, "received new key from device"); err != nil {
				return err
			}
		}
		if err = h.storeDirect(ctx, kept, current); err != nil {
			return err
		}
	}
	h.uow.stageRow(stagedWrite{
		write: func(ctx context.Context) (err error) {
			// The sender's keys may have come since: what they changed does not know this session yet.
			if known.outdated(h) {
				if sender, err = h.deriveSender(ctx, arrived, guard != nil, nil); err != nil {
					return err
				}
			}
			h.tellAfterCommit(Change{Sessions: []id.SessionID{session.ID()}})
			if err = h.judgePending(ctx, sender.Sender); err != nil {
				return err
			}
			return h.mergeClaim(ctx, sender)
		},
		pile: func(ctx context.Context, p *pile) (bool, error) {
			if known.outdated(h) || h.resolver.toJudge(sender.Sender) > 0 || !h.pileClaim(ctx, p, sender) {
				return false, nil
			}
			h.tellAfterCommit(Change{Sessions: []id.SessionID{session.ID()}})
			return true, nil
		},
	})
	log.Debug().Str("state", string(sender.State)).Stringer("device_id", sender.DeviceID).Msg("Received a room key")
	return nil
}

// readDevice reads the device keys that the message holds.
func (k *arrivedKey) readDevice() {
	if keys := k.olmEvent.SenderDeviceKeys; keys != nil {
		k.embedded, k.fault = embeddedKeys(keys)
	}
}

func embeddedKeys(keys *mautrix.DeviceKeys) (json.RawMessage, error) {
	embedded, err := json.Marshal(keys)
	if err != nil {
		return nil, fmt.Errorf("failed to marshal sender_device_keys: %w", err)
	}
	return embedded, nil
}

// read makes the Megolm session, with mautrix's checks. How long it may be used is said by takeRoomKey.
func (k *arrivedKey) read() {
	k.content = new(event.RoomKeyEventContent)
	if err := json.Unmarshal(k.olmEvent.Content.VeryRaw, k.content); err != nil {
		k.fault = fmt.Errorf("failed to parse the room key: %w", err)
		return
	}
	if k.content.Algorithm != id.AlgorithmMegolmV1 {
		k.fault = errNotMegolm
		return
	}
	if k.olmEvent.Keys.Ed25519 == "" {
		k.fault = errNoClaimedKey
		return
	}
	session, err := crypto.NewInboundGroupSession(k.olmEvent.SenderKey, k.olmEvent.Keys.Ed25519, k.content.RoomID, k.content.SessionKey,
		0, 0, k.content.SharedHistory, k.content.IsScheduled)
	switch {
	case err != nil:
		k.fault = fmt.Errorf("failed to read the session key: %w", err)
	case session.ID() != k.content.SessionID:
		k.fault = errSessionIDMismatch
	default:
		session.SourceUser = k.olmEvent.Sender
		k.session = session
	}
}

func (h *Hook) rotation(ctx context.Context, content *event.RoomKeyEventContent) (maxAge time.Duration, maxMessages int) {
	config, err := receivingOf(ctx).encryption(ctx, content.RoomID)
	if err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to get the encryption event of the room")
	}
	if config != nil {
		maxAge = time.Duration(config.RotationPeriodMillis) * time.Millisecond
		if maxAge == 0 {
			maxAge = defaultRotationPeriod
		}
		if maxMessages = config.RotationPeriodMessages; maxMessages == 0 {
			maxMessages = defaultRotationMessages
		}
	}
	if content.MaxAge != 0 {
		maxAge = time.Duration(content.MaxAge) * time.Millisecond
	}
	if content.MaxMessages != 0 {
		maxMessages = content.MaxMessages
	}
	return maxAge, min(maxMessages, math.MaxInt32) // more does not fit into mautrix's column
}

// deriveSender walks the steps without the network, or takes the walk of a key of the same batch that was sent by the same device in the same
// way. The session's guard is for what needs the network: without it, that is left to whoever has it, and to the resolver after it. The steps
// are walked all the same, for what is known now may not be known any more then: somebody else who claims the session must not keep its
// owner from being proven.
func (h *Hook) deriveSender(ctx context.Context, arrived *arrivedKey, guarded bool, r *receiving) (*SenderData, error) {
	now, session, olmEvent := h.clock(), arrived.session, arrived.olmEvent
	claim := SenderData{
		SessionID: session.ID(), RoomID: session.RoomID, SenderKey: session.SenderKey, SigningKey: session.SigningKey,
		Sender: olmEvent.Sender, Source: SourceDirect, ReceivedAt: now, UpdatedAt: now,
		Embedded: sql.NullBool{Bool: olmEvent.SenderDeviceKeys != nil, Valid: true},
	}
	key := senderOfWalk{olmEvent.Sender, walkKey{session.SenderKey, session.SigningKey, string(arrived.embedded)}}
	walk := r.walkOf(key)
	if walk == nil {
		var err error
		if walk, err = h.walk(ctx, claim, arrived, r); err != nil {
			return nil, err
		}
		r.keep(key, walk)
	}
	walk.now = now
	derived := walk.conclude(&claim)
	if !guarded && !derived.NextRetry.IsZero() {
		// Who has the guard is about to look; so is the resolver after it.
		derived.RetryCount, derived.NextRetry = 0, now
	}
	return derived, nil
}

// walk walks the steps for a claim, by the device keys that came with it, if any.
func (h *Hook) walk(ctx context.Context, claim SenderData, arrived *arrivedKey, r *receiving) (*derivation, error) {
	known := r.cachesFor(h.store)
	walk := &derivation{caches: known, anchor: h.anchor(), now: claim.ReceivedAt, checked: h.signatures, data: claim}
	walk.embedded, walk.embeddedKeys = arrived.embedded, arrived.embeddedKeys
	var err error
	if walk.current, err = known.deviceListCurrent(ctx, claim.Sender); err != nil {
		return nil, err
	}
	if _, err = walk.derive(ctx); err != nil {
		return nil, err
	}
	walk.noteSigners()
	return walk, nil
}

// holderOf gives who holds the session ID now: in what is staged, or in the database.
func (h *Hook) holderOf(ctx context.Context, sessionID id.SessionID) (*holder, error) {
	if staged := h.uow.stagedGroup(sessionID); staged != nil {
		return &holder{staged.RoomID, staged.SenderKey, staged.SigningKey}, nil
	}
	if receivingOf(ctx).isAbsent(sessionID) {
		return nil, nil
	}
	return h.store.holder(ctx, h.uow.AccountID, sessionID)
}

// storeDirect stores a session that came in an m.room_key. One that was imported before under its ID, and is not the same
// session, makes room.
func (h *Hook) storeDirect(ctx context.Context, session *crypto.InboundGroupSession, current *holder) error {
	if current != nil {
		existing, err := h.existing(ctx, session.RoomID, session.ID())
		if err != nil {
			return err
		}
		if existing != nil && existing.KeySource != id.KeySourceDirect && !connected(existing, session) {
			zerolog.Ctx(ctx).Warn().Msg("An imported session was not what its owner has shared now: taking the owner's")
			if err = h.uow.PutGroupSession(ctx, session); err == nil {
				h.mach.MarkSessionReceived(ctx, session.RoomID, session.ID(), session.Internal.FirstKnownIndex())
			}
			return err
		}
	}
	if err := h.mach.StoreGroupSession(ctx, session); err != nil {
		return fmt.Errorf("failed to store Megolm session %s: %w", session.ID(), err)
	}
	return nil
}

// existing gives the session that is stored under the ID for the room, or nil when its key was never there or is gone.
func (h *Hook) existing(ctx context.Context, roomID id.RoomID, sessionID id.SessionID) (*crypto.InboundGroupSession, error) {
	existing, err := h.uow.GetGroupSession(ctx, roomID, sessionID)
	if errors.Is(err, crypto.ErrGroupSessionWithheld) {
		return nil, nil
	}
	return existing, err
}

// connected says whether two sessions of one ID have the same ratchet. A session key is signed, but an export is not: whoever
// writes into a backup may put any ratchet under a session's ID.
func connected(a, b *crypto.InboundGroupSession) bool {
	index := max(a.Internal.FirstKnownIndex(), b.Internal.FirstKnownIndex())
	ratchetA, errA := a.Internal.Export(index)
	ratchetB, errB := b.Internal.Export(index)
	return errA == nil && errB == nil && bytes.Equal(ratchetA, ratchetB)
}

// mergeClaim stores what a key that has just been stored says. If the session was rejected, and this does not undo it, the key is
// taken away again.
func (h *Hook) mergeClaim(ctx context.Context, arrived *SenderData) error {
	news, err := h.noteSigners(ctx, arrived)
	if err != nil {
		return err
	}
	merged, err := h.store.mergeClaim(ctx, arrived)
	if err != nil {
		return err
	}
	if merged.State == StateRejected {
		if err = h.reject(ctx, merged); err != nil {
			return err
		}
	}
	if news {
		news, err = h.proves(ctx, arrived)
	}
	if err != nil || !news {
		return err
	}
	h.learntInPassing()
	// What proves the device proves its other sessions.
	if err = h.rejudgeProven(ctx, arrived.Sender); err != nil {
		return err
	}
	change, err := h.judgeStored(ctx, []id.UserID{arrived.Sender}, nil)
	change.Users = append(change.Users, arrived.Sender)
	h.tellAfterCommit(change)
	return err
}

// pileClaim is mergeClaim for a claim that is the first one to a session, of a device about which there is no news: that stores it, and no more.
// Of anything else it says no.
func (h *Hook) pileClaim(ctx context.Context, p *pile, arrived *SenderData) bool {
	unclaimed := foresightOf(ctx).unclaimed
	if noted, _ := h.store.noted.look(digestOfSigners(arrived)); !noted || arrived.State == StateRejected || !unclaimed.has(arrived.SessionID) {
		return false
	}
	delete(unclaimed, arrived.SessionID)
	p.claims = append(p.claims, arrived)
	return true
}

// proves says that today's self-signing key is among those that have signed the claim's device. The signatures of others are kept in
// case that they turn out to be the user's; until then they prove nothing, and a sender can make up as many as there are messages.
func (h *Hook) proves(ctx context.Context, claim *SenderData) (bool, error) {
	identity, err := h.store.identity(ctx, claim.Sender)
	return identity != nil && isSigner(claim.signers, identity.SelfSigningKey), err
}

// otherClaim is what is known of the sender of a session that did not come in an m.room_key: nothing, unless we made it.
func (h *Hook) otherClaim(session *crypto.InboundGroupSession) *SenderData {
	now := h.clock()
	claim := &SenderData{
		SessionID: session.ID(), RoomID: session.RoomID, SenderKey: session.SenderKey, SigningKey: session.SigningKey,
		Source: sourceOf(session.KeySource), Legacy: true, State: StateUnknownDevice, ReceivedAt: now, UpdatedAt: now,
	}
	if h.uow.isOwn(session) && session.KeySource == id.KeySourceDirect {
		h.claimOwn(claim)
	}
	return claim
}
