package cryptohook

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Examination is a verdict with all that it rests on: see [Hook.Examine].
type Examination struct {
	// Event is a copy, decrypted if it can be and may be shown: see [Verdict].ContentWithheld.
	Event   *event.Event
	Verdict Verdict
	// Claims are those on the event's session, the one first that the verdict rests on. Empty for a session without any, and for
	// plaintext.
	Claims []Claim
	// Identity is what is known of the user of the first claim; nil if nobody is known.
	Identity *UserReport
}

// Claim is what is stored about one device that claims to have made a session.
type Claim struct {
	UserID   id.UserID
	DeviceID id.DeviceID
	// SenderKey (curve25519) and SigningKey (ed25519) are those of the Olm message that brought the session's key.
	SenderKey  id.SenderKey
	SigningKey id.Ed25519
	State      State
	// MasterKey is the master key of the identity that proved the device, empty in states that are not proven.
	MasterKey id.Ed25519
	Source    Source
	// SourceUser is who gave the key, for [SourceHistoryBundle].
	SourceUser id.UserID
	// Reason says why the claim is in its state, where that does not say it.
	Reason string
	Legacy bool
	// ReceivedAt is when the session's key came first, UpdatedAt when the claim was last judged with another result. Zero: before there
	// was a hook.
	ReceivedAt, UpdatedAt time.Time
	// NextRetry is when the sender's keys are looked at again by the schedule; zero when nothing is scheduled.
	NextRetry time.Time
	// DeviceKeys is the device keys object as it was signed, nil if none is kept. It may have been published since the session came.
	DeviceKeys json.RawMessage
	// Signers are the keys whose signatures on the device were checked, in its user's name, besides its own.
	Signers []id.Ed25519
	// Steps is the way through the steps A–J that leads to the state.
	Steps []Step
}

// Step is one of the steps A–J, and what came of it.
type Step struct {
	// Letter is "A" to "J", without I.
	Letter  string
	Outcome StepOutcome
}

// StepOutcome is what came of a step, in one word.
type StepOutcome string

const (
	StepEmbeddedKeys   StepOutcome = "embedded_keys"              // A: the message that brought the key held the device's keys (MSC4147)
	StepNoEmbeddedKeys StepOutcome = "no_embedded_keys"           // A: it did not
	StepNotRecorded    StepOutcome = "not_recorded"               // A: nobody knows, the key came before that was recorded, or over somebody else
	StepDeviceFound    StepOutcome = "device_found"               // B: the user publishes a device with the sender key
	StepDeviceNotFound StepOutcome = "device_not_found"           // B: the user does not
	StepWaits          StepOutcome = "waits"                      // C, F: the user's keys are asked for, and looked at again
	StepGivenUp        StepOutcome = "given_up"                   // C, F: nothing is scheduled any more
	StepSigned         StepOutcome = "signed"                     // D: somebody has signed the device in the user's name
	StepNotSigned      StepOutcome = "not_signed"                 // D: nobody has
	StepNotOwner       StepOutcome = "owner_check_failed"         // D: the device's keys are not those of the message that brought the key
	StepIdentityKnown  StepOutcome = "identity_known"             // E: the user has cross-signing keys
	StepNoIdentity     StepOutcome = "no_identity"                // E: none are known
	StepSignedByOwner  StepOutcome = "signed_by_owner"            // G: it is the user's self-signing key that signed the device
	StepSignedEarlier  StepOutcome = "signed_by_earlier_identity" // G: it is the self-signing key of an identity that the user had before
	StepSignedByOther  StepOutcome = "signed_by_other"            // G: it is another key, or that of another identity than today's
	StepSignatureValid StepOutcome = "signature_valid"            // H
	StepForged         StepOutcome = "signature_forged"           // H: the session is rejected
	StepVerified       StepOutcome = "verified"                   // J: the sender is proven, and we verified this user
	StepUnverified     StepOutcome = "unverified"                 // J: the sender is proven, and we did not verify this user
	StepViolation      StepOutcome = "violation"                  // J: the sender is proven, and this user was verified with another identity
)

// Examine judges an event of a room, from what is known now, and gives what the verdict rests on. The event is as the homeserver
// gives it (GET /event): encrypted or not; it is not changed. Examine uses up no message index, waits for nothing and asks nobody, and works
// for events that were handled long ago. It fails only when the database does, and for an event without an ID or a room.
//
// It says of a message without a key that it cannot be decrypted, even if the key may still come. It recognises a message that somebody
// has sent again only if the original was decrypted here.
func (h *Hook) Examine(ctx context.Context, evt *event.Event) (*Examination, error) {
	if evt.ID == "" || evt.RoomID == "" {
		return nil, errNoEvent
	}
	copied := copyEvent(evt)
	if copied.Type == event.EventEncrypted && copied.Content.Parsed != nil {
		return h.examineEncrypted(ctx, copied)
	}
	encrypted, err := h.wasEncrypted(ctx, copied)
	if err != nil {
		return nil, err
	}
	// What is no ciphertext is judged by no keys, and waits for none.
	judged, verdict, _, err := h.judge(ctx, &inboxEvent{eventID: evt.ID, roomID: evt.RoomID, roomEncrypted: encrypted}, copied)
	return &Examination{Event: judged, Verdict: verdict}, err
}

var errNoEvent = errors.New("cryptohook: the event lacks its ID or its room")

// copyEvent gives a copy of an event that the homeserver has shown, parsed as those are that the inbox hands on.
func copyEvent(evt *event.Event) *event.Event {
	copied := *evt
	copied.Type.Class = event.MessageEventType
	copied.Content = event.Content{VeryRaw: bytes.Clone(evt.Content.VeryRaw)}
	if evt.Content.VeryRaw == nil {
		copied.Content.VeryRaw, _ = json.Marshal(&evt.Content)
	}
	if copied.Content.ParseRaw(copied.Type) != nil {
		copied.Content.Parsed = nil
	}
	return &copied
}

const getRoomEncryptedQuery = `SELECT room_encrypted FROM sendertrust_inbox WHERE event_id=$1`

// wasEncrypted says whether the room was encrypted when the event came, as long as that is remembered; later, whether it is now.
func (h *Hook) wasEncrypted(ctx context.Context, evt *event.Event) (encrypted bool, err error) {
	err = h.store.QueryRow(ctx, getRoomEncryptedQuery, evt.ID).Scan(&encrypted)
	if errors.Is(err, sql.ErrNoRows) {
		encrypted, err = h.client.StateStore.IsEncrypted(ctx, evt.RoomID)
	}
	if err != nil {
		return false, fmt.Errorf("failed to look up whether %s is encrypted: %w", evt.RoomID, err)
	}
	return encrypted, nil
}

func (h *Hook) examineEncrypted(ctx context.Context, evt *event.Event) (*Examination, error) {
	sessionID := evt.Content.AsEncrypted().SessionID
	all, err := h.store.grounds(ctx, sessionID)
	if err == nil && len(all) == 0 {
		// A key that has just come may be staged only.
		if err = h.uow.flush(ctx); err == nil {
			all, err = h.store.grounds(ctx, sessionID)
		}
	}
	if err != nil {
		return nil, err
	}
	claims := livingClaims(all)
	verdict, err := h.weigh(ctx, evt.Sender, sessionID, claims)
	if err != nil {
		return nil, err
	}
	verdict.EventID = evt.ID
	verdict.Outdated = h.awaitsKeys(claims)
	found := &Examination{Event: evt}
	if found.Event, err = h.open(ctx, evt, &verdict, len(claims) > 0); err != nil {
		return nil, err
	}
	found.Verdict = verdict
	for _, claim := range append(claims, rejectedBeside(claims, all)...) {
		told, err := h.tell(ctx, claim, verdict.SourceUser)
		if err != nil {
			return nil, err
		}
		found.Claims = append(found.Claims, told)
	}
	if len(claims) > 0 && claims[0].Sender != "" {
		found.Identity, err = h.User(ctx, claims[0].Sender)
	}
	return found, err
}

// rejectedBeside gives the claims that livingClaims has left out.
func rejectedBeside(living, all []ground) []ground {
	var rejected []ground
	for _, claim := range all {
		if !slices.Contains(living, claim) {
			rejected = append(rejected, claim)
		}
	}
	return rejected
}

// open decrypts an event if its verdict lets it be shown, and puts into the verdict why not.
func (h *Hook) open(ctx context.Context, evt *event.Event, verdict *Verdict, claimed bool) (*event.Event, error) {
	switch verdict.Code {
	case CodeSessionRejected, CodeMismatchedSender:
		verdict.ContentWithheld = true
		return evt, nil
	}
	// As in a disputed session, the message index is compared with who has used it, and stays free if nobody has.
	decrypted, err := h.decrypt(withDisputed(ctx), evt)
	if err != nil {
		if !claimed {
			// There is no session, so there is nothing about its sender either.
			verdict.State, verdict.Legacy = "", false
		}
		verdict.Code, verdict.Reason, _, err = h.whyUndecrypted(ctx, evt.RoomID, evt.Sender, verdict.SessionID, err)
		return evt, err
	}
	if !h.options.Requirement.allows(*verdict) {
		verdict.ContentWithheld = true
		return evt, nil
	}
	decrypted.Mautrix.EventSource |= event.SourceDecrypted
	return decrypted, nil
}

// tell gives a claim with what is kept of its device.
func (h *Hook) tell(ctx context.Context, claim ground, sourceUser id.UserID) (told Claim, err error) {
	told = Claim{
		UserID: claim.Sender, DeviceID: claim.DeviceID, SenderKey: claim.SenderKey, SigningKey: claim.SigningKey, State: claim.State,
		MasterKey: claim.MasterKey, Source: claim.Source, Reason: claim.Reason, Legacy: claim.Legacy,
		ReceivedAt: orZero(claim.ReceivedAt), UpdatedAt: orZero(claim.UpdatedAt), NextRetry: claim.NextRetry,
	}
	if claim.Source == SourceHistoryBundle {
		told.SourceUser = sourceUser
	}
	if claim.Sender == "" {
		told.Steps = stepsOf(claim.SenderData, nil, nil)
		return told, nil
	}
	if told.Signers, err = h.store.signers(ctx, claim.Sender, claim.SenderKey, claim.SigningKey); err != nil {
		return told, err
	}
	signer, err := h.signerOf(ctx, claim.SenderData, claim.identity)
	if err != nil {
		return told, err
	}
	if told.DeviceKeys, err = h.deviceKeysOf(ctx, claim.SenderData, signer); err != nil {
		return told, err
	}
	walk, err := h.walkAgain(ctx, claim.SenderData)
	told.Steps = stepsOf(claim.SenderData, claim.identity, walk)
	return told, err
}

// orZero takes the time of claims that were made up for sessions from before there was a hook for none.
func orZero(at time.Time) time.Time {
	if at.UnixMilli() <= 0 {
		return time.Time{}
	}
	return at
}

// signerOf gives the self-signing key that proves a claim, or would: today's, or that of the earlier identity that did. It is empty if that is
// not known.
func (h *Hook) signerOf(ctx context.Context, claim *SenderData, identity *Identity) (id.Ed25519, error) {
	switch {
	case identity == nil:
		return "", nil
	case !claim.State.proven() || claim.MasterKey == identity.MasterKey:
		return identity.SelfSigningKey, nil
	}
	kept, err := h.store.identityKeys(ctx, claim.Sender)
	for _, key := range kept {
		if key.masterKey == claim.MasterKey {
			return key.selfSigningKey, err
		}
	}
	return "", err
}

// deviceKeysOf gives what is kept of the device keys of a claim, as they were signed: a copy with the signature of that key if there is one.
func (h *Hook) deviceKeysOf(ctx context.Context, claim *SenderData, signer id.Ed25519) (json.RawMessage, error) {
	keys := deviceKeyPair{claim.SenderKey, claim.SigningKey}
	signed, err := h.store.signedObjects(ctx, claim.Sender, keys)
	if err != nil || signed[signer] != nil {
		return signed[signer], err
	}
	published, err := h.store.publishedDevices(ctx, claim.Sender, keys)
	if err != nil {
		return nil, err
	}
	copies := published
	if claim.DeviceKeys != nil {
		copies = append([]json.RawMessage{claim.DeviceKeys}, published...)
	}
	for _, key := range slices.Sorted(maps.Keys(signed)) {
		copies = append(copies, signed[key])
	}
	for _, object := range copies {
		if signedBy(object, claim.Sender, signer) {
			return object, nil
		}
	}
	if len(copies) == 0 {
		return nil, nil
	}
	return copies[0], nil
}

// walkAgain gives the steps that an unproven claim of a known device leads through now; nothing for the others.
func (h *Hook) walkAgain(ctx context.Context, claim *SenderData) ([]byte, error) {
	if claim.State != StateDeviceInfo {
		return nil, nil
	}
	walk := derivation{
		caches: h.store, anchor: h.anchor(), now: h.clock(), queried: true, current: true, embedded: claim.deviceInfo(), data: *claim,
	}
	_, err := walk.derive(ctx)
	return walk.path, err
}

// stepsOf says which way through the steps leads to the state that a claim has: see steps.go. walk is that of walkAgain. A session that
// somebody else has exported was not walked.
func stepsOf(claim *SenderData, identity *Identity, walk []byte) []Step {
	if claim.Source != SourceDirect && !claim.State.proven() {
		return nil
	}
	waits := StepWaits
	if claim.NextRetry.IsZero() {
		waits = StepGivenUp
	}
	steps := deviceSteps(claim)
	switch {
	case claim.State == StateUnknownDevice && claim.Reason == reasonOwnerCheckFailed:
		return append(steps, Step{"D", StepNotOwner})
	case claim.State == StateUnknownDevice:
		return append(steps, Step{"C", waits})
	case claim.State == StateDeviceInfo && !bytes.ContainsRune(walk, 'E'):
		return append(steps, Step{"D", StepNotSigned})
	}
	steps = append(steps, Step{"D", StepSigned})
	if claim.State == StateDeviceInfo && bytes.ContainsRune(walk, 'F') {
		return append(steps, Step{"E", StepNoIdentity}, Step{"F", waits})
	}
	steps = append(steps, Step{"E", StepIdentityKnown})
	switch {
	case claim.State == StateDeviceInfo:
		return append(steps, Step{"G", StepSignedByOther})
	case claim.State == StateRejected:
		return append(steps, Step{"G", StepSignedByOwner}, Step{"H", StepForged})
	case identity != nil && claim.MasterKey == identity.MasterKey:
		steps = append(steps, Step{"G", StepSignedByOwner})
	default:
		steps = append(steps, Step{"G", StepSignedEarlier})
	}
	return append(steps, Step{"H", StepSignatureValid}, Step{"J", outcomeOf[claim.State]})
}

var outcomeOf = map[State]StepOutcome{
	StateSenderVerified: StepVerified, StateSenderUnverified: StepUnverified, StateVerificationViolation: StepViolation,
}

// deviceSteps are A and B: where the device keys came from.
func deviceSteps(claim *SenderData) []Step {
	known := claim.State != StateUnknownDevice || claim.Reason == reasonOwnerCheckFailed
	found := Step{"B", StepDeviceNotFound}
	if known {
		found.Outcome = StepDeviceFound
	}
	switch {
	case claim.Embedded.Valid && claim.Embedded.Bool:
		return []Step{{"A", StepEmbeddedKeys}}
	case claim.Embedded.Valid:
		return []Step{{"A", StepNoEmbeddedKeys}, found}
	case known:
		return []Step{{"A", StepNotRecorded}}
	default:
		return []Step{{"A", StepNotRecorded}, found}
	}
}
