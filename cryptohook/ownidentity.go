package cryptohook

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// How we watch ourselves. Others check what we send by what the homeserver publishes about our own device: if that is no longer what we
// have, somebody has deleted the device, taken the account over, or the server lies. We cannot tell which, and need not: whoever answers
// people as if they could check it must not go on. What we know of others rests on keys that we hold ourselves, and stays as true as it was.
//
// A server can show us the right keys and everybody else other ones. That cannot be seen from here; others see it.

// OwnState says whether the homeserver publishes our device and our identity as they are.
type OwnState string

const (
	// OwnUnknown: nobody has asked yet.
	OwnUnknown OwnState = "unknown"
	// OwnFine: our device is published, with its keys, signed by our identity, if we have one.
	OwnFine OwnState = "fine"
	// OwnDeviceMissing: our device is not among those that the server lists. It was deleted, or is hidden.
	OwnDeviceMissing OwnState = "device_missing"
	// OwnDeviceChanged: our device is published with keys that are not ours, or with none that are valid.
	OwnDeviceChanged OwnState = "device_changed"
	// OwnSignatureMissing: nothing that the server publishes shows that our device belongs to our identity.
	OwnSignatureMissing OwnState = "signature_missing"
	// OwnOtherIdentity: a cross-signing key is published for our account that is not ours.
	OwnOtherIdentity OwnState = "other_identity"
)

// OwnIdentity is what the homeserver publishes about ourselves, by its newest answer to a key query, whoever made it.
type OwnIdentity struct {
	State OwnState
	// MasterKey is ours, and PublishedMasterKey the one that the server publishes (unpadded base64); empty: there is none.
	MasterKey, PublishedMasterKey id.Ed25519
	// Since is when the server began to answer so, and CheckedAt when it last did.
	Since, CheckedAt time.Time
}

// Trusted says that nothing is wrong as far as we know: others can check what we send.
func (o OwnIdentity) Trusted() bool { return o.State == OwnFine || o.State == OwnUnknown }

// changedFrom says that it is another thing to tell.
func (o OwnIdentity) changedFrom(before OwnIdentity) bool {
	return o.State != before.State || o.PublishedMasterKey != before.PublishedMasterKey || o.MasterKey != before.MasterKey
}

// OwnIdentity gives what the homeserver publishes about ourselves. It is watched while [Hook.Run] runs: by every key query that has us
// in it, after each change of our device list, after each time that the server could not be reached, and every ten minutes.
func (h *Hook) OwnIdentity() OwnIdentity { return h.own.get() }

// HadIdentity says whether the homeserver has ever shown a cross-signing identity for our account.
func (h *Hook) HadIdentity(ctx context.Context) (bool, error) {
	identity, err := h.store.identity(ctx, h.client.UserID)
	return identity != nil && identity.MasterKey != "", err
}

const (
	// ownEvery is how often we ask for our own keys, and ownSuspectedEvery how often while something is wrong with them.
	ownEvery          = 10 * time.Minute
	ownSuspectedEvery = 5 * time.Second
)

// ownWatch remembers what the server has said about ourselves.
type ownWatch struct {
	mu       sync.Mutex
	watching bool
	now      OwnIdentity
	askedAt  time.Time
}

// begin has answers count from now on. Before, our device and our identity may not be published yet.
func (w *ownWatch) begin(at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.watching, w.now, w.askedAt = true, OwnIdentity{State: OwnUnknown, Since: at}, at
}

func (w *ownWatch) get() OwnIdentity {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.now.State == "" {
		return OwnIdentity{State: OwnUnknown}
	}
	return w.now
}

// note takes an answer in. It gives what was known before, and says whether that has changed.
func (w *ownWatch) note(seen OwnIdentity, at time.Time) (before, now OwnIdentity, changed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before = w.now
	if !w.watching {
		return before, before, false
	}
	seen.Since, seen.CheckedAt = before.Since, at
	if changed = seen.changedFrom(before); changed {
		seen.Since = at
	}
	w.now, w.askedAt = seen, at
	return before, seen, changed
}

// due says that it is time to ask for our own keys. Whoever is told so asks.
func (w *ownWatch) due(at time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.left(at) > 0 {
		return false
	}
	w.askedAt = at
	return true
}

// untilDue is how long nobody need ask.
func (w *ownWatch) untilDue(at time.Time) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.left(at)
}

// left is untilDue for those who hold the lock. A clock that was set back has it begin anew.
func (w *ownWatch) left(at time.Time) time.Duration {
	if !w.watching {
		return ownEvery
	}
	every := ownEvery
	if !w.now.Trusted() {
		every = ownSuspectedEvery
	}
	if w.askedAt.After(at) {
		w.askedAt = at
	}
	return w.askedAt.Add(every).Sub(at)
}

// ownDevice is our device as we have it.
type ownDevice struct {
	deviceID    id.DeviceID
	identityKey id.IdentityKey
	signingKey  id.Ed25519
}

// judgeOwn compares what an answer publishes about ourselves with what we have. The worst of several faults counts: another identity
// means that somebody else may speak in our name, other keys that somebody else uses the device, the others that nobody can check us.
func (a trustAnchor) judgeOwn(device ownDevice, answer *keyQuery) OwnIdentity {
	seen := OwnIdentity{State: OwnFine, MasterKey: a.masterKey}
	foreign := false
	for _, key := range []struct {
		published json.RawMessage
		usage     id.CrossSigningUsage
		ours      id.Ed25519
	}{
		{answer.MasterKeys[a.userID], id.XSUsageMaster, a.masterKey},
		{answer.SelfSigningKeys[a.userID], id.XSUsageSelfSigning, a.selfSigningKey},
		{answer.UserSigningKeys[a.userID], id.XSUsageUserSigning, a.userSigningKey},
	} {
		published, err := parseCrossSigningKey(key.published, a.userID, key.usage)
		if key.usage == id.XSUsageMaster {
			seen.PublishedMasterKey = published
		}
		// What is no key at all vouches for nothing; the signature is missing then.
		foreign = foreign || err == nil && published != key.ours
	}
	raw, listed := answer.DeviceKeys[a.userID][device.deviceID]
	keys, err := parseDeviceKeys(raw, a.userID, device.deviceID)
	switch {
	case a.masterKey != "" && foreign:
		seen.State = OwnOtherIdentity
	case !listed:
		seen.State = OwnDeviceMissing
	case err != nil || keys.Keys.GetEd25519(device.deviceID) != device.signingKey || keys.Keys.GetCurve25519(device.deviceID) != device.identityKey:
		seen.State = OwnDeviceChanged
	case a.masterKey != "" && !a.vouchedFor(answer, raw):
		seen.State = OwnSignatureMissing
	}
	return seen
}

// vouchedFor says whether what is published shows that our device belongs to our identity, to whoever checks it.
func (a trustAnchor) vouchedFor(answer *keyQuery, device json.RawMessage) bool {
	identity, err := a.readIdentity(a.userID, answer.MasterKeys[a.userID], answer.SelfSigningKeys[a.userID])
	return err == nil && identity != nil && identity.masterKey == a.masterKey && identity.selfSigningKey == a.selfSigningKey &&
		signedBy(device, a.userID, a.selfSigningKey)
}

// observeOwn looks at what an answer says about ourselves, if it was asked. A homeserver that answers about others and leaves our own
// account out lists no device of ours.
func (h *Hook) observeOwn(asked *mautrix.ReqQueryKeys, number uint64, answer *keyQuery) {
	devices, about := asked.DeviceKeys[h.client.UserID]
	if _, failed := answer.Failures[h.client.UserID.Homeserver()]; failed || !about || len(devices) > 0 {
		return
	}
	if !h.questions.answers(h.client.UserID, number) {
		return
	}
	account := h.mach.GetAccount()
	seen := h.anchor().judgeOwn(ownDevice{h.client.DeviceID, account.IdentityKey(), account.SigningKey()}, answer)
	before, now, changed := h.own.note(seen, h.clock())
	if !changed {
		return
	}
	log := h.log.With().Str("state", string(now.State)).Stringer("device_id", h.client.DeviceID).
		Stringer("master_key", now.MasterKey).Stringer("published_master_key", now.PublishedMasterKey).Logger()
	switch {
	case !now.Trusted():
		log.Error().Msg("What the homeserver publishes about this account is not what we have: " + ownFaults[now.State])
	case !before.Trusted():
		log.Warn().Msg("The homeserver publishes this account's own device and identity as they are again")
	default:
		log.Debug().Msg("The homeserver publishes this account's own device and identity as they are")
	}
	if h.options.OnOwnIdentity != nil {
		h.options.OnOwnIdentity(now)
	}
}

// ownFaults says what is wrong, for the log.
var ownFaults = map[OwnState]string{
	OwnDeviceMissing:    "it lists this device no longer; somebody has deleted it, or the server hides it",
	OwnDeviceChanged:    "it shows other keys for this device; another program uses the same device, or the server lies",
	OwnSignatureMissing: "it does not show that this device belongs to the account's own identity; nobody can check what we send",
	OwnOtherIdentity:    "it shows another encryption identity; somebody has taken the account over or reset it, or the server lies",
}
