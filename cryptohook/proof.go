package cryptohook

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// A proof is a file that shows to others who sent a message, as far as that can be shown: the sender's keys and the signatures on them, the
// bot's own, and the verdict that follows from them. All of it is signed by the bot's device. Whoever has the bot's master key checks it
// with [VerifyProof], which needs neither network nor database, and works the verdict out anew.

// ProofReason says why there is no proof of an event.
type ProofReason string

const (
	NoProofNotEncrypted  ProofReason = "not_encrypted"   // plaintext: nobody has signed anything
	NoProofUndecryptable ProofReason = "undecryptable"   // there is no key, or the message is broken
	NoProofWithheld      ProofReason = "withheld"        // what is not shown is not proven either: rejected, mismatched, or below the trust requirement
	NoProofConflict      ProofReason = "conflict"        // several devices claim the session
	NoProofNobody        ProofReason = "nobody_known"    // nothing is known of the device that made the session
	NoProofNoDeviceKeys  ProofReason = "no_device_keys"  // the device's keys are not kept as they were signed
	NoProofMalformed     ProofReason = "malformed_keys"  // keys that the proof needs are published in a form that is read in different ways
	NoProofNoOwnIdentity ProofReason = "no_own_identity" // we have no cross-signing identity to end the chain in
	NoProofIncomplete    ProofReason = "incomplete"      // the verdict rests on what was seen before it was kept as it was signed
)

// UnprovableError is what [Hook.Prove] fails with when a proof would be false, or would show what is withheld.
type UnprovableError struct {
	Reason  ProofReason
	Verdict Verdict
}

func (e *UnprovableError) Error() string { return "the event cannot be proven: " + string(e.Reason) }

// Proof is a file that shows to others what we know of a message's sender: see [VerifyProof]. It is made by [Hook.Prove], and marshals to
// the file's JSON.
type Proof struct {
	file json.RawMessage
}

// MarshalJSON gives the file: canonical JSON.
func (p *Proof) MarshalJSON() ([]byte, error) { return p.file, nil }

const (
	proofFormat  = "dev.sendertrust.proof"
	proofVersion = 1
	// maxProof is how long a file may be, in bytes. One takes about 6,000.
	maxProof = 1 << 20
)

// proofFile is the JSON of a proof. The objects that were signed are whole, but for "unsigned". Times are in milliseconds since 1970.
type proofFile struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	MadeAt  int64  `json:"made_at_ts"`
	Event   struct {
		RoomID  id.RoomID  `json:"room_id"`
		EventID id.EventID `json:"event_id"`
		Sender  id.UserID  `json:"sender"`
		SentAt  int64      `json:"origin_server_ts"`
	} `json:"event"`
	Session struct {
		SessionID  id.SessionID `json:"session_id"`
		DeviceID   id.DeviceID  `json:"device_id"`
		SenderKey  id.SenderKey `json:"sender_key"`
		SigningKey id.Ed25519   `json:"signing_key"`
		Source     Source       `json:"source"`
		ReceivedAt int64        `json:"received_at_ts"`
	} `json:"session"`
	Verdict struct {
		Code     Code  `json:"code"`
		State    State `json:"state"`
		Outdated bool  `json:"outdated"`
	} `json:"verdict"`
	DeviceKeys json.RawMessage `json:"device_keys"`
	// Identity is the sender's identity of today. It is left out where nothing of it is known.
	Identity *proofToday `json:"identity,omitempty"`
	// Earlier is the identity that the device belonged to, if that is not today's.
	Earlier *proofIdentity `json:"earlier_identity,omitempty"`
	Bot     struct {
		UserID         id.UserID       `json:"user_id"`
		DeviceID       id.DeviceID     `json:"device_id"`
		DeviceKeys     json.RawMessage `json:"device_keys"`
		MasterKey      json.RawMessage `json:"master_key"`
		SelfSigningKey json.RawMessage `json:"self_signing_key"`
		UserSigningKey json.RawMessage `json:"user_signing_key"`
	} `json:"bot"`
	// Checksums name what was changed: see checksumsOf.
	Checksums  map[string]string               `json:"checksums,omitempty"`
	Signatures map[id.UserID]map[string]string `json:"signatures,omitempty"`
}

// proofIdentity is a cross-signing identity of the sender: its keys as they were signed.
type proofIdentity struct {
	MasterKey      json.RawMessage `json:"master_key"`
	SelfSigningKey json.RawMessage `json:"self_signing_key,omitempty"`
}

// proofToday is the sender's identity of today, with the bot's word about it.
type proofToday struct {
	proofIdentity
	FirstMasterKey id.Ed25519 `json:"first_master_key"`
	// WasVerified says that some master key of the sender was verified, and that this was not withdrawn.
	WasVerified bool `json:"was_verified"`
	// Withdrawn says that the bot's signature on the master key no longer counts.
	Withdrawn bool `json:"withdrawn"`
	// PinnedKey is the master key that the bot's configuration pins for the sender.
	PinnedKey id.Ed25519 `json:"pinned_key,omitempty"`
	// FormerlyVerifiedBy is a user-signing key that the bot has given up, and signed the master key with.
	FormerlyVerifiedBy id.Ed25519 `json:"formerly_verified_by,omitempty"`
}

// Prove makes a proof of who sent an event, as [Hook.Examine] judges it. It fails with [UnprovableError] where there is nothing to prove.
func (h *Hook) Prove(ctx context.Context, evt *event.Event) (*Proof, error) {
	found, err := h.Examine(ctx, evt)
	if err != nil {
		return nil, err
	}
	unprovable := func(reason ProofReason) error { return &UnprovableError{reason, found.Verdict} }
	keys := h.mach.CrossSigningKeys
	if reason := found.unprovable(); reason != "" {
		return nil, unprovable(reason)
	} else if keys == nil {
		return nil, unprovable(NoProofNoOwnIdentity)
	}
	file := h.beginProof(evt, found)
	if file.DeviceKeys = forProof(found.Claims[0].DeviceKeys); file.DeviceKeys == nil {
		return nil, unprovable(NoProofMalformed)
	}
	if file.Identity, file.Earlier, err = h.proofIdentities(ctx, &found.Claims[0]); err != nil {
		return nil, err
	}
	if err = h.signOwnKeys(file, keys); err != nil {
		return nil, err
	}
	signed, err := h.signProof(file)
	if err != nil {
		return nil, err
	}
	// Whatever is missing, or has changed while this was put together: nobody is given a file that is not accepted.
	if _, err = VerifyProof(signed, keys.MasterKey.PublicKey()); err != nil {
		h.log.Warn().Err(err).Stringer("event_id", evt.ID).Msg("Not giving a proof that would not be accepted")
		return nil, unprovable(NoProofIncomplete)
	}
	return &Proof{signed}, nil
}

// unprovable says why there is no proof of what was found, if there is none.
func (found *Examination) unprovable() ProofReason {
	switch found.Verdict.Code {
	case CodeNotEncrypted, CodeSentInClear:
		return NoProofNotEncrypted
	case CodeUnableToDecrypt:
		return NoProofUndecryptable
	case CodeSessionConflict:
		return NoProofConflict
	}
	switch {
	case found.Verdict.ContentWithheld || found.Verdict.Code == CodeMismatchedSender:
		return NoProofWithheld
	case len(found.Claims) == 0 || found.Claims[0].State == StateUnknownDevice:
		return NoProofNobody
	case found.Claims[0].DeviceKeys == nil:
		return NoProofNoDeviceKeys
	default:
		return ""
	}
}

func (h *Hook) beginProof(evt *event.Event, found *Examination) *proofFile {
	claim := &found.Claims[0]
	file := &proofFile{Format: proofFormat, Version: proofVersion, MadeAt: h.clock().UnixMilli()}
	file.Event.RoomID, file.Event.EventID, file.Event.Sender, file.Event.SentAt = evt.RoomID, evt.ID, evt.Sender, evt.Timestamp
	file.Session.SessionID, file.Session.DeviceID, file.Session.Source = found.Verdict.SessionID, claim.DeviceID, claim.Source
	file.Session.SenderKey, file.Session.SigningKey = claim.SenderKey, claim.SigningKey
	if !claim.ReceivedAt.IsZero() {
		file.Session.ReceivedAt = claim.ReceivedAt.UnixMilli()
	}
	file.Verdict.Code, file.Verdict.State, file.Verdict.Outdated = found.Verdict.Code, found.Verdict.State, found.Verdict.Outdated
	file.Bot.UserID, file.Bot.DeviceID = h.client.UserID, h.client.DeviceID
	return file
}

// forProof gives a signed object as it goes into a proof; nil if there is none, or if it is read in different ways.
func forProof(raw json.RawMessage) json.RawMessage {
	value, err := parseStrict(raw)
	object, isObject := value.(map[string]any)
	if err != nil || !isObject {
		return nil
	}
	return canonicalJSON(withoutFields(object, "unsigned"))
}

// proofIdentities gives the sender's identity of today, and the one that proved the claim's device if that was another, as far as they are
// kept.
func (h *Hook) proofIdentities(ctx context.Context, claim *Claim) (today *proofToday, earlier *proofIdentity, err error) {
	identity, err := h.store.identity(ctx, claim.UserID)
	if err != nil || identity == nil {
		return nil, nil, err
	}
	kept, err := h.store.identityKeys(ctx, claim.UserID)
	if err != nil {
		return nil, nil, err
	}
	objects := proofIdentityOf(kept, identity.MasterKey)
	if objects == nil {
		return nil, nil, nil
	}
	if objects.MasterKey, err = h.withOurSignature(ctx, identity, objects.MasterKey); err != nil {
		return nil, nil, err
	}
	anchor := h.anchor()
	today = &proofToday{
		proofIdentity: *objects, FirstMasterKey: identity.FirstMasterKey, WasVerified: identity.WasVerified, PinnedKey: anchor.pins[claim.UserID],
	}
	if identity.VerifiedBy != anchor.userSigningKey {
		today.FormerlyVerifiedBy = identity.VerifiedBy
	}
	if today.Withdrawn, err = h.store.isWithdrawn(ctx, claim.UserID, identity.MasterKey); err != nil {
		return nil, nil, err
	}
	if claim.MasterKey != "" && claim.MasterKey != identity.MasterKey {
		earlier = proofIdentityOf(kept, claim.MasterKey)
	}
	return today, earlier, nil
}

// proofIdentityOf gives the objects of the identity with that master key, or nil if they are not kept.
func proofIdentityOf(kept []identityKey, masterKey id.Ed25519) *proofIdentity {
	i := slices.IndexFunc(kept, func(key identityKey) bool { return key.masterKey == masterKey })
	if i < 0 {
		return nil
	}
	master := forProof(kept[i].masterObject)
	if master == nil {
		return nil
	}
	return &proofIdentity{MasterKey: master, SelfSigningKey: forProof(kept[i].selfSigningObject)}
}

// withOurSignature adds our user-signing key's signature to a master key that we have verified, if the homeserver has not shown it with it
// yet: mautrix keeps it.
func (h *Hook) withOurSignature(ctx context.Context, identity *Identity, master json.RawMessage) (json.RawMessage, error) {
	own, signer := h.client.UserID, h.anchor().userSigningKey
	if identity.VerifiedBy != signer || signedBy(master, own, signer) {
		return master, nil
	}
	signatures, err := h.uow.GetSignaturesForKeyBy(ctx, identity.UserID, identity.MasterKey, own)
	if err != nil {
		return nil, fmt.Errorf("failed to read our signature on the master key of %s: %w", identity.UserID, err)
	}
	// mautrix's column has more characters than a signature: PostgreSQL fills it up.
	signed, err := addSignature(master, own, signer.String(), strings.TrimRight(signatures[signer], " "))
	if err != nil || !signedBy(signed, own, signer) {
		return master, err
	}
	return signed, nil
}

// addSignature puts a signature into an object.
// https://spec.matrix.org/v1.16/appendices/#signing-json
func addSignature(object json.RawMessage, userID id.UserID, keyName, signature string) (json.RawMessage, error) {
	value, err := parseStrict(object)
	if err != nil {
		return nil, err
	}
	signed := value.(map[string]any)
	byUser, _ := signed["signatures"].(map[string]any)
	if byUser == nil {
		byUser = make(map[string]any)
	}
	ofUser, _ := byUser[userID.String()].(map[string]any)
	if ofUser == nil {
		ofUser = make(map[string]any)
	}
	ofUser["ed25519:"+keyName] = signature
	byUser[userID.String()], signed["signatures"] = ofUser, byUser
	return canonicalJSON(signed), nil
}

// jsonSigning is what an Olm account and a cross-signing key have in common.
type jsonSigning interface{ SignJSON(any) (string, error) }

// signOwnKeys puts our own keys into a proof, signed as we have them published.
func (h *Hook) signOwnKeys(file *proofFile, keys *crypto.CrossSigningKeysCache) (err error) {
	own, account := h.client.UserID, h.mach.GetAccount()
	sign := func(into *json.RawMessage, object any, keyName string, signer jsonSigning) {
		if err != nil {
			return
		}
		if *into == nil {
			if *into, err = json.Marshal(object); err != nil {
				return
			}
		}
		var signature string
		if signature, err = signer.SignJSON(*into); err == nil {
			*into, err = addSignature(*into, own, keyName, signature)
		}
	}
	master := keys.MasterKey.PublicKey().String()
	if file.Bot.MasterKey, err = json.Marshal(ownKeyObject(own, id.XSUsageMaster, keys.MasterKey.PublicKey())); err != nil {
		return err
	}
	sign(&file.Bot.SelfSigningKey, ownKeyObject(own, id.XSUsageSelfSigning, keys.SelfSigningKey.PublicKey()), master, keys.MasterKey)
	sign(&file.Bot.UserSigningKey, ownKeyObject(own, id.XSUsageUserSigning, keys.UserSigningKey.PublicKey()), master, keys.MasterKey)
	device := &mautrix.DeviceKeys{
		UserID: own, DeviceID: h.client.DeviceID, Algorithms: []id.Algorithm{id.AlgorithmMegolmV1, id.AlgorithmOlmV1},
		Keys: mautrix.KeyMap{
			id.NewDeviceKeyID(id.KeyAlgorithmCurve25519, h.client.DeviceID): account.IdentityKey().String(),
			id.NewDeviceKeyID(id.KeyAlgorithmEd25519, h.client.DeviceID):    account.SigningKey().String(),
		},
	}
	sign(&file.Bot.DeviceKeys, device, h.client.DeviceID.String(), account)
	sign(&file.Bot.DeviceKeys, device, keys.SelfSigningKey.PublicKey().String(), keys.SelfSigningKey)
	if err != nil {
		return fmt.Errorf("failed to sign our own keys: %w", err)
	}
	return nil
}

func ownKeyObject(userID id.UserID, usage id.CrossSigningUsage, key id.Ed25519) map[string]any {
	return map[string]any{
		"user_id": userID, "usage": []id.CrossSigningUsage{usage}, "keys": map[id.KeyID]id.Ed25519{id.NewKeyID(id.KeyAlgorithmEd25519, key.String()): key},
	}
}

// signProof gives the file, with its checksums, signed by our device.
func (h *Hook) signProof(file *proofFile) (json.RawMessage, error) {
	raw, err := json.Marshal(file)
	if err != nil {
		return nil, fmt.Errorf("failed to write the proof: %w", err)
	}
	value, err := parseStrict(raw)
	if err != nil {
		return nil, fmt.Errorf("failed to write the proof: %w", err)
	}
	tree := value.(map[string]any)
	tree["checksums"] = checksumsOf(tree)
	signature, err := h.mach.GetAccount().Internal.Sign(canonicalJSON(tree))
	if err != nil {
		return nil, fmt.Errorf("failed to sign the proof: %w", err)
	}
	return addSignature(canonicalJSON(tree), h.client.UserID, h.client.DeviceID.String(), string(signature))
}

// checksumsOf gives a checksum for each field that holds the bot's word. They protect nothing: whoever changes a field can change its
// checksum, and it is the bot's signature that keeps anybody from doing either. They let a file that was damaged, or changed by somebody who
// did not know them, say which field that is.
func checksumsOf(tree map[string]any) map[string]any {
	sums := make(map[string]any)
	for path, leaf := range proofShape.leaves("", tree) {
		sum := sha256.Sum256(append([]byte(path+"\n"), canonicalJSON(leaf)...))
		sums[path] = base64.RawStdEncoding.EncodeToString(sum[:9])
	}
	return sums
}

// proofTime reads a time of a proof; zero is none.
func proofTime(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

// shape is what a field of a proof may hold.
type shape struct {
	kind     shapeKind
	optional bool
	// fields are those of an object.
	fields map[string]shape
}

type shapeKind int

const (
	shapeObject shapeKind = iota
	shapeText
	shapeKey     // 32 bytes, unpadded base64
	shapeInteger // not negative
	shapeFlag
	shapeSigned // an object that somebody has signed: it is for the signatures to say what may be in it
	shapeTexts  // an object of texts
	shapeSignatures
)

var identityShape = map[string]shape{"master_key": {kind: shapeSigned}, "self_signing_key": {kind: shapeSigned, optional: true}}

// proofShape is the file as a whole.
var proofShape = shape{fields: map[string]shape{
	"format": {kind: shapeText}, "version": {kind: shapeInteger}, "made_at_ts": {kind: shapeInteger},
	"event": {fields: map[string]shape{
		"room_id": {kind: shapeText}, "event_id": {kind: shapeText}, "sender": {kind: shapeText}, "origin_server_ts": {kind: shapeInteger},
	}},
	"session": {fields: map[string]shape{
		"session_id": {kind: shapeKey}, "device_id": {kind: shapeText}, "sender_key": {kind: shapeKey}, "signing_key": {kind: shapeKey},
		"source": {kind: shapeText}, "received_at_ts": {kind: shapeInteger},
	}},
	"verdict":     {fields: map[string]shape{"code": {kind: shapeText}, "state": {kind: shapeText}, "outdated": {kind: shapeFlag}}},
	"device_keys": {kind: shapeSigned},
	"identity": {optional: true, fields: with(identityShape, map[string]shape{
		"first_master_key": {kind: shapeKey}, "was_verified": {kind: shapeFlag}, "withdrawn": {kind: shapeFlag},
		"pinned_key": {kind: shapeKey, optional: true}, "formerly_verified_by": {kind: shapeKey, optional: true},
	})},
	"earlier_identity": {optional: true, fields: identityShape},
	"bot": {fields: map[string]shape{
		"user_id": {kind: shapeText}, "device_id": {kind: shapeText}, "device_keys": {kind: shapeSigned}, "master_key": {kind: shapeSigned},
		"self_signing_key": {kind: shapeSigned}, "user_signing_key": {kind: shapeSigned},
	}},
	"checksums":  {kind: shapeTexts},
	"signatures": {kind: shapeSignatures},
}}

func with(fields, more map[string]shape) map[string]shape {
	all := maps.Clone(fields)
	maps.Copy(all, more)
	return all
}

// leaves gives the fields that hold the bot's word, by their paths.
func (s shape) leaves(path string, value any) map[string]any {
	found := make(map[string]any)
	switch s.kind {
	case shapeObject:
		object, _ := value.(map[string]any)
		for name, field := range s.fields {
			if member, there := object[name]; there {
				maps.Copy(found, field.leaves(below(path, name), member))
			}
		}
	case shapeText, shapeKey, shapeInteger, shapeFlag:
		found[path] = value
	}
	return found
}
