package cryptohook

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Room keys that are received together. Nearly all of what comes between devices is room keys, on Olm sessions that are there: a run of those
// is decrypted under one hold of mautrix's Olm lock, and read on all processors. Each goes through the checks that mautrix makes of one.
//
// Anything else, and anything about which something is unusual, ends the run before it, and is received by receiveEncrypted. That a message is
// no room key is seen after it was decrypted: then the run is undone, and what is left of the /sync is received one by one.

// A run has so many messages at least, and at most: who wants to send an Olm message waits for it.
const (
	shortestRun = 2
	longestRun  = 100
)

// olmMessage is a message of a run.
type olmMessage struct {
	evt       *event.Event
	senderKey id.SenderKey
	kind      id.OlmMsgType
	body      string
	hash      [sha256.Size]byte
	// session has decrypted it, into plaintext.
	session   *crypto.OlmSession
	plaintext []byte
	// device is what mautrix's store has under its sender key, or nil.
	device *id.Device
	arrivedKey
	// other says that it is no room key; dropped is why it is not looked at further.
	other   bool
	dropped error
}

// receiveTogether receives the run of room keys that the events begin with, and says how many events it has dealt with. The error is one of the
// store's: the unit of work is broken.
func (h *Hook) receiveTogether(ctx context.Context, events []*event.Event, r *receiving) (taken int, err error) {
	if r.oneByOne || h.oneByOne {
		return 0, nil
	} else if r.pause > 0 {
		r.pause--
		return 0, nil
	}
	run := h.runOf(events, r)
	if len(run) < shortestRun {
		return 0, nil
	}
	defer h.uow.endMessage()
	ctx = r.context(ctx)
	var failed error
	if err = h.withOlmLock(ctx, func() { run, failed = h.decryptRun(ctx, run, r) }); err != nil {
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Failed to have mautrix's Olm lock; receiving one by one")
		r.oneByOne = true
		return 0, nil
	}
	if err = errors.Join(failed, h.uow.failure()); err != nil {
		return 0, err
	}
	r.paused(len(run) == 0)
	keys := make([]*arrivedKey, len(run))
	for i, m := range run {
		keys[i] = &m.arrivedKey
	}
	if err = r.lookUpSessions(ctx, keys...); err != nil {
		return 0, h.uow.breakWith(err)
	}
	for _, m := range run {
		if err = h.takeMessage(ctx, m); err != nil {
			return 0, err
		}
	}
	return len(run), nil
}

// takeMessage stores what was in a message of a run.
func (h *Hook) takeMessage(ctx context.Context, m *olmMessage) error {
	log := h.log.With().Stringer("sender", m.evt.Sender).Str("to_device_type", m.evt.Type.Type).Stringer("sender_key", m.senderKey).Logger()
	if m.dropped != nil {
		log.Error().Err(m.dropped).Msg("Ignoring an encrypted to-device event")
		return nil
	}
	return h.takeRoomKey(log.WithContext(ctx), &m.arrivedKey)
}

// paused notes whether an attempt was in vain. After those in a row more and more events are received one by one before the next: of a crowd of
// new devices each attempt would be.
func (r *receiving) paused(inVain bool) {
	if !inVain {
		r.inVain = 0
		return
	}
	r.inVain = min(2*r.inVain+1, longestRun)
	r.pause = r.inVain
}

// olmMessageIn reads an Olm message for us, of a size that a key may have; nil: the event holds none.
func (h *Hook) olmMessageIn(evt *event.Event) *olmMessage {
	content, encrypted := evt.Content.Parsed.(*event.EncryptedEventContent)
	if !encrypted || content.Algorithm != id.AlgorithmOlmV1 || len(evt.Content.VeryRaw) > h.options.Limits.ToDeviceBytes {
		return nil
	}
	ours := content.OlmCiphertext[h.mach.GetAccount().IdentityKey()]
	message, err := base64.RawStdEncoding.DecodeString(ours.Body)
	if err != nil || len(message) == 0 || ours.Type != id.OlmMsgTypePreKey && ours.Type != id.OlmMsgTypeMsg {
		return nil
	}
	return &olmMessage{evt: evt, senderKey: content.SenderKey, kind: ours.Type, body: ours.Body, hash: sha256.Sum256(message)}
}

// runOf gives the messages that the events begin with and that may be room keys on sessions that are there.
func (h *Hook) runOf(events []*event.Event, r *receiving) []*olmMessage {
	var run []*olmMessage
	for _, evt := range events[:min(len(events), longestRun)] {
		m := r.messages[evt]
		if m == nil || !h.isForUs(evt) {
			break
		}
		if before, looked := r.receivedAt(m.hash); !looked || !before.IsZero() {
			break
		}
		run = append(run, m)
	}
	return run
}

// isForUs says that a to-device event is not for another device.
func (h *Hook) isForUs(evt *event.Event) bool {
	return evt.ToUserID == "" || evt.ToUserID == h.client.UserID && evt.ToDeviceID == h.client.DeviceID
}

// decryptRun decrypts as much of a run as nothing is unusual about, reads the room keys, and stages the ratchets and hashes. It runs under
// mautrix's Olm lock, and leaves the gate closed. A panic of mautrix's is left to receiveEncrypted: until all is staged, nothing has happened.
func (h *Hook) decryptRun(ctx context.Context, run []*olmMessage, r *receiving) (decrypted []*olmMessage, err error) {
	h.uow.closeGate()
	tried, staging := make(triedSessions), false
	defer func() {
		reason := recover()
		switch {
		case reason == nil:
		case staging:
			decrypted, err = nil, h.uow.breakWith(fmt.Errorf("failed to stage Olm sessions: %v", reason))
		default:
			zerolog.Ctx(ctx).Error().Any("reason", reason).Msg("mautrix cannot bear an Olm message; receiving one by one")
			r.oneByOne, decrypted, err = true, nil, h.uow.restore(ctx, tried)
		}
	}()
	decrypted, err = h.decryptBeginning(ctx, run, tried)
	if err != nil {
		return nil, err
	}
	sideBySide(len(decrypted), func(i int) { h.readMessage(decrypted[i]) })
	if first := slices.IndexFunc(decrypted, func(m *olmMessage) bool { return m.other }); first >= 0 {
		r.oneByOne = true
		if err = h.uow.restore(ctx, tried); err != nil {
			return nil, err
		}
		// Up to that message nothing is unusual, and what was read stays true.
		if decrypted, err = h.decryptBeginning(ctx, decrypted[:first], tried); err != nil {
			return nil, err
		}
	}
	staging = true
	return decrypted, h.stageRun(ctx, decrypted)
}

// decryptBeginning decrypts the messages of a run until one cannot be decrypted by a session that is there. Every session that is tried is noted.
func (h *Hook) decryptBeginning(ctx context.Context, run []*olmMessage, tried triedSessions) ([]*olmMessage, error) {
	for i, m := range run {
		sessions, err := h.uow.GetSessions(ctx, m.senderKey)
		if err != nil {
			return nil, err
		}
		// With more of them mautrix deletes some.
		if len(sessions) > 2*crypto.MaxOlmSessionsPerDevice {
			return run[:i], nil
		}
		for _, session := range sessions {
			tried[session] = struct{}{}
		}
		if m.session, m.plaintext = m.decrypt(sessions); m.session == nil {
			return run[:i], nil
		}
		if m.device, err = h.uow.FindDeviceByKey(ctx, m.evt.Sender, m.senderKey); err != nil {
			return nil, err
		}
	}
	return run, nil
}

// decrypt tries the sessions as mautrix does. It gives nothing if none of them fits, or a fitting one fails.
func (m *olmMessage) decrypt(sessions crypto.OlmSessionList) (*crypto.OlmSession, []byte) {
	for _, session := range sessions {
		if m.kind == id.OlmMsgTypePreKey {
			if matches, err := session.Internal.MatchesInboundSession(m.body); err != nil {
				return nil, nil
			} else if !matches {
				continue
			}
		}
		plaintext, err := session.Decrypt(m.body, m.kind)
		if err == nil {
			return session, plaintext
		} else if m.kind == id.OlmMsgTypePreKey {
			return nil, nil
		}
	}
	return nil, nil
}

// stageRun stages that the messages were received: the hash of each, and of each session the state after its last one.
func (h *Hook) stageRun(ctx context.Context, run []*olmMessage) error {
	var sessions []*crypto.OlmSession
	for _, m := range run {
		if !slices.Contains(sessions, m.session) {
			sessions = append(sessions, m.session)
		}
	}
	if err := h.uow.updateSessions(sessions); err != nil {
		return err
	}
	for _, m := range run {
		if err := h.uow.PutOlmHash(ctx, m.hash, h.clock()); err != nil {
			return err
		}
	}
	return nil
}

// olmPayload is what an Olm message holds. mautrix reads the same into [crypto.DecryptedOlmEvent], and the content besides into a map.
// https://spec.matrix.org/v1.16/client-server-api/#molmv1curve25519-aes-sha2
type olmPayload struct {
	Sender           id.UserID           `json:"sender"`
	SenderDeviceKeys rawMember           `json:"sender_device_keys"`
	Keys             crypto.OlmEventKeys `json:"keys"`
	Recipient        id.UserID           `json:"recipient"`
	RecipientKeys    crypto.OlmEventKeys `json:"recipient_keys"`
	SenderDeviceID   id.DeviceID         `json:"sender_device"`
	Type             event.Type          `json:"type"`
	Content          json.RawMessage     `json:"content"`
}

// readMessage makes mautrix's checks of an Olm message, and reads the room key. Only what it is given is touched: it runs beside others. What it
// panics about is left to receiveEncrypted.
func (h *Hook) readMessage(m *olmMessage) {
	defer func() {
		if recover() != nil {
			m.other = true
		}
	}()
	var payload olmPayload
	err := json.Unmarshal(m.plaintext, &payload)
	sent := h.sentKeys.read(payload.SenderDeviceKeys.value)
	if err = cmp.Or(err, sent.unreadable); err != nil {
		m.dropped = fmt.Errorf("failed to parse the Olm payload: %w", err)
		return
	}
	if payload.SenderDeviceKeys.times > 1 || payload.Type.Type != event.ToDeviceRoomKey.Type || !isObject(payload.Content) {
		m.other = true
		return
	}
	m.olmEvent = &crypto.DecryptedOlmEvent{
		Source: m.evt, SenderKey: m.senderKey, Sender: payload.Sender, SenderDeviceKeys: sent.keys, Keys: payload.Keys,
		Recipient: payload.Recipient, RecipientKeys: payload.RecipientKeys, Type: payload.Type, Content: event.Content{VeryRaw: payload.Content},
	}
	m.embedded, m.embeddedKeys, m.fault = sent.embedded, sent.embeddedKeys, sent.fault
	if m.dropped = h.refusal(m); m.dropped == nil && m.fault == nil {
		m.read()
	}
}

// rawMember is a member of an object as it came. Of one that is there several times mautrix mixes the values.
type rawMember struct {
	value json.RawMessage
	times int
}

// UnmarshalJSON implements [json.Unmarshaler].
func (m *rawMember) UnmarshalJSON(value []byte) error {
	m.value, m.times = bytes.Clone(value), m.times+1
	return nil
}

// sentKeys remember the sender_device_keys of messages by their bytes, so that they need not be read again: a device sends the same ones with
// each of its keys.
type sentKeys struct {
	*generations[digest, sentDeviceKeys]
}

// sentKeysInGeneration is how many bytes of JSON the keys in a generation were read from: those of some 400 devices. What is remembered takes
// about five times as much.
const sentKeysInGeneration = 512 << 10

func newSentKeys() sentKeys {
	return sentKeys{newGenerations[digest](sentKeysInGeneration, func(sent sentDeviceKeys) int { return sent.length })}
}

// sentDeviceKeys are device keys that came with a message; none is without keys.
type sentDeviceKeys struct {
	// length is that of the JSON.
	length int
	keys   *mautrix.DeviceKeys
	// embedded, embeddedKeys and fault are those of [arrivedKey].
	embedded          json.RawMessage
	embeddedKeys      *mautrix.DeviceKeys
	unreadable, fault error
}

// read reads the keys, of which nothing may be changed: they are those of other messages as well.
func (s sentKeys) read(value json.RawMessage) sentDeviceKeys {
	if len(value) == 0 || string(value) == "null" {
		return sentDeviceKeys{}
	}
	hash := digest(sha256.Sum256(value))
	sent, known := s.look(hash)
	if known {
		return sent
	}
	sent.length = len(value)
	if sent.unreadable = json.Unmarshal(value, &sent.keys); sent.unreadable == nil {
		sent.embedded, sent.fault = embeddedKeys(sent.keys)
		if sent.fault == nil && json.Unmarshal(sent.embedded, &sent.embeddedKeys) != nil {
			sent.embeddedKeys = nil // the walk finds that out for itself
		}
	}
	s.keep(hash, sent)
	return sent
}

func isObject(content json.RawMessage) bool { return bytes.HasPrefix(content, []byte("{")) }

// refusal is why mautrix would not take an Olm message: decryptAndParseOlmCiphertext and validateDevice.
func (h *Hook) refusal(m *olmMessage) error {
	e, device := m.olmEvent, m.device
	switch {
	case e.Sender != m.evt.Sender:
		return crypto.ErrSenderMismatch
	case e.Recipient != h.client.UserID:
		return crypto.ErrRecipientMismatch
	case e.RecipientKeys.Ed25519 != h.mach.GetAccount().SigningKey():
		return crypto.ErrRecipientKeyMismatch
	}
	signingKey := id.Ed25519("")
	if device != nil {
		signingKey = device.SigningKey
	}
	if keys := e.SenderDeviceKeys; keys != nil {
		signingKey = keys.Keys.GetEd25519(keys.DeviceID)
		switch {
		case keys.UserID != e.Sender:
			return fmt.Errorf("sender_device_keys: %w", crypto.ErrSenderMismatch)
		case keys.Keys.GetCurve25519(keys.DeviceID) != m.senderKey:
			return fmt.Errorf("sender_device_keys: %w", crypto.ErrSenderKeyMismatch)
		case signingKey == "":
			return crypto.ErrNoSigningKeyFound
		case m.senderKey == "":
			return crypto.ErrNoIdentityKeyFound
		case device != nil && device.SigningKey != signingKey:
			return fmt.Errorf("sender_device_keys: %w", crypto.ErrMismatchingSigningKey)
		case !h.selfSigned(m, signingKey):
			return fmt.Errorf("sender_device_keys: %w", crypto.ErrInvalidKeySignature)
		}
	}
	if (device != nil || e.SenderDeviceKeys != nil) && signingKey != e.Keys.Ed25519 {
		return crypto.ErrSigningKeyMismatch
	}
	return nil
}

// selfSigned says whether the device has signed its keys that the message holds.
func (h *Hook) selfSigned(m *olmMessage, signingKey id.Ed25519) bool {
	keys := m.olmEvent.SenderDeviceKeys
	return h.signatures.valid(digestOf(m.embedded, keys.UserID, keys.DeviceID.String(), signingKey), func() bool {
		valid, err := signatures.VerifySignatureJSON(*keys, keys.UserID, keys.DeviceID.String(), signingKey)
		return err == nil && valid
	})
}
