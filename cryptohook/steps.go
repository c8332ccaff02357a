package cryptohook

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// The steps A–J by which a room key's sender is derived, one function each, each returning the next.
//
//	A  does the Olm message hold the sender's device keys (MSC4147)?  yes → D   no → B
//	B  do we know a device of the sender with this curve25519 key?    yes → D   no → C
//	C  store the session; ask for the sender's keys; look again.      found → D   not → wait
//	D  is the device cross-signed?                                    yes → E   no → wait
//	E  do we have the sender's cross-signing keys?                    yes → G   no → F
//	F  store the session; ask for the sender's keys; look again.      found → G   not → wait
//	G  is it our self-signing key that signed the device?             yes → H   no → wait
//	H  is that signature valid?                                       yes → J   no → the session is rejected
//	J  the sender is proven: store MXID, master key and trust.
//
// "Wait" means that the row is stored with the time at which the resolver looks again. No step touches the network: the
// resolver asks for the keys, then walks the steps again with queried set.

// caches is what the steps may look at: what is stored locally, at once.
type caches interface {
	// deviceByKey gives the device keys object of the user's device with that curve25519 key, or nil. Deleted devices are
	// not found. Of several the one with the given signing key is preferred.
	deviceByKey(ctx context.Context, userID id.UserID, senderKey id.SenderKey, signingKey id.Ed25519) (json.RawMessage, error)
	// identity gives what is known of the user's cross-signing identity, or nil.
	identity(ctx context.Context, userID id.UserID) (*Identity, error)
	// signers gives the keys whose signatures on the user's device with these keys were seen and checked, ever, in the user's name.
	signers(ctx context.Context, userID id.UserID, senderKey id.SenderKey, signingKey id.Ed25519) ([]id.Ed25519, error)
}

// derivation is one walk through the steps.
type derivation struct {
	caches caches
	anchor trustAnchor
	now    time.Time
	// jitter is a factor around 1 for the back-off, so that many sessions do not ask at the same instant; 0 takes one by chance.
	jitter float64
	// checked are signatures that were checked; nil: all are checked anew.
	checked *checkedSignatures
	// embedded is the sender_device_keys object of the Olm message, if it has one; embeddedKeys is what is in it, nil if nobody has read it yet.
	embedded     json.RawMessage
	embeddedKeys *mautrix.DeviceKeys
	// queried says that the sender's keys were asked for since the row was stored: this walk is a retry.
	queried bool
	// current says that the cached device list of the sender is up to date, so that asking again at once is no use.
	current bool

	data SenderData
	// path is the letters of the steps taken, for logs and tests.
	path []byte

	// raw and keys are the device keys at hand.
	raw  json.RawMessage
	keys *mautrix.DeviceKeys
	// bound are the device keys that the session keeps while the device is not proven.
	bound     json.RawMessage
	boundKeys *mautrix.DeviceKeys
	identity  *Identity
	// seen are the device's signers, once they were looked up.
	seen []id.Ed25519
	// waits says that the walk ended with a time to look again; asks, that it is now, unless the keys were asked for already.
	waits, asks bool
}

type step func(context.Context, *derivation) (step, error)

// derive walks the steps and returns the sender data to store. The error is one of the caches'.
func (d *derivation) derive(ctx context.Context) (*SenderData, error) {
	d.data.Reason = ""
	var err error
	for next := step(stepA); next != nil; {
		if next, err = next(ctx, d); err != nil {
			return nil, fmt.Errorf("failed to take step %c: %w", d.path[len(d.path)-1], err)
		}
	}
	return &d.data, nil
}

// stepA: does the to-device message hold the device keys of MSC4147? On a retry they are those that were stored.
func stepA(_ context.Context, d *derivation) (step, error) {
	d.path = append(d.path, 'A')
	if len(d.embedded) > 0 && d.useKeys(d.embedded, d.embeddedKeys) {
		return stepD, nil
	}
	return stepB, nil
}

// stepB: do the locally cached devices contain one with the message's sender key?
func stepB(ctx context.Context, d *derivation) (step, error) {
	d.path = append(d.path, 'B')
	raw, err := d.cachedDevice(ctx)
	if err != nil {
		return nil, err
	}
	if raw != nil && d.useDevice(raw) {
		return stepD, nil
	}
	return stepC, nil
}

// stepC: no device info locally. The session is stored, and the sender's keys are asked for at once.
func stepC(_ context.Context, d *derivation) (step, error) {
	d.path = append(d.path, 'C')
	d.data.State = StateUnknownDevice
	return d.wait(true)
}

// stepD: is the device cross-signed? If the message's copy of its keys is not, it may have been at some time, or the published copy
// may be by now: a signature that was checked once stays evidence, whatever the server shows today.
func stepD(ctx context.Context, d *derivation) (step, error) {
	d.path = append(d.path, 'D')
	if !d.ownsSession() {
		d.data.State, d.data.Reason = StateUnknownDevice, reasonOwnerCheckFailed
		d.data.DeviceKeys, d.data.NextRetry, d.data.RetryCount = nil, time.Time{}, 0
		return nil, nil
	}
	d.bound, d.boundKeys = d.raw, d.keys
	signed, err := d.signed(ctx, d.crossSigned, func(seen []id.Ed25519) bool { return len(seen) > 0 })
	if err != nil {
		return nil, err
	} else if !signed {
		return d.deviceInfo(!d.current)
	}
	return stepE, nil
}

// stepE: do we have the user's cross-signing keys?
func stepE(ctx context.Context, d *derivation) (step, error) {
	d.path = append(d.path, 'E')
	identity, err := d.caches.identity(ctx, d.data.Sender)
	if err != nil {
		return nil, err
	}
	if identity == nil || identity.MasterKey == "" || identity.SelfSigningKey == "" {
		return stepF, nil
	}
	d.identity = identity
	return stepG, nil
}

// stepF: no cross-signing keys. The session is stored with the device info, and the keys are asked for at once.
func stepF(_ context.Context, d *derivation) (step, error) {
	d.path = append(d.path, 'F')
	return d.deviceInfo(true)
}

// stepG: does the self-signing key that we know match the one that signed the device info? If the message's copy of the
// device keys is older than the user's self-signing key, a signature that was seen before may match, or the published copy's.
func stepG(ctx context.Context, d *derivation) (step, error) {
	d.path = append(d.path, 'G')
	signed, err := d.signed(ctx, d.signedByKnownKey, func(seen []id.Ed25519) bool { return slices.Contains(seen, d.identity.SelfSigningKey) })
	if err != nil {
		return nil, err
	} else if !signed {
		return d.deviceInfo(!d.current)
	}
	return stepH, nil
}

// stepH: is that signature valid? If not, somebody forged it: the session is invalid. One that was seen before was valid then.
func stepH(_ context.Context, d *derivation) (step, error) {
	d.path = append(d.path, 'H')
	if d.signedByKnownKey() && !d.validSignature() {
		d.data.State, d.data.Reason = StateRejected, reasonForgedSignature
		d.data.DeviceID = d.keys.DeviceID
		d.data.DeviceKeys, d.data.NextRetry, d.data.RetryCount = nil, time.Time{}, 0
		return nil, nil
	}
	return stepJ, nil
}

// stepJ: the device is proven to be the sender's. Device info and retry fields make room for MXID, master key and trust.
func stepJ(_ context.Context, d *derivation) (step, error) {
	d.path = append(d.path, 'J')
	d.data.State = d.anchor.stateOf(d.identity.MasterKey, d.identity)
	d.data.DeviceID = d.keys.DeviceID
	d.data.MasterKey = d.identity.MasterKey
	d.data.DeviceKeys, d.data.NextRetry, d.data.RetryCount = nil, time.Time{}, 0
	d.data.Legacy = false
	proof := signer{key: d.identity.SelfSigningKey}
	if d.signedByKnownKey() {
		proof.object = d.raw
	}
	d.data.signers = []signer{proof}
	return nil, nil
}

// useDevice takes the device keys object as the sender's device. It says no to one that cannot be read.
func (d *derivation) useDevice(raw json.RawMessage) bool { return d.useKeys(raw, nil) }

// useKeys is useDevice when it is known what is in the object; nil: it is not.
func (d *derivation) useKeys(raw json.RawMessage, keys *mautrix.DeviceKeys) bool {
	if keys == nil && json.Unmarshal(raw, &keys) != nil || keys == nil || keys.UserID != d.data.Sender {
		return false
	}
	d.raw, d.keys = raw, keys
	return true
}

func (d *derivation) cachedDevice(ctx context.Context) (json.RawMessage, error) {
	return d.caches.deviceByKey(ctx, d.data.Sender, d.data.SenderKey, d.data.SigningKey)
}

// ownsSession is the owner check: the device's keys must equal those of the Olm message that brought the session.
func (d *derivation) ownsSession() bool {
	return d.keys.Keys.GetCurve25519(d.keys.DeviceID) == d.data.SenderKey && d.keys.Keys.GetEd25519(d.keys.DeviceID) == d.data.SigningKey
}

// crossSigned says that somebody other than the device itself signed its keys in the name of its user.
func (d *derivation) crossSigned() bool { return len(namedSigners(d.keys)) > 0 }

// noteSigners notes whose signatures on the copy that the session is bound to are valid: besides today's self-signing key those of keys
// that may turn out to be the user's.
func (d *derivation) noteSigners() {
	if d.boundKeys == nil {
		return
	}
	for _, key := range validSigners(d.bound, d.boundKeys, "", func(key id.Ed25519) bool { return !isSigner(d.data.signers, key) }) {
		d.data.signers = append(d.data.signers, signer{key, d.bound})
	}
}

// signedByKnownKey says that the device keys name the self-signing key that we know as a signer. Whether the signature is
// valid is step H's question.
func (d *derivation) signedByKnownKey() bool {
	_, signed := d.keys.Signatures[d.data.Sender][id.NewKeyID(id.KeyAlgorithmEd25519, d.identity.SelfSigningKey.String())]
	return signed
}

// validSignature says whether the self-signing key that we know has signed the device keys at hand.
func (d *derivation) validSignature() bool {
	return d.checked.signedBy(d.raw, d.data.Sender, d.identity.SelfSigningKey)
}

// signed says whether the device keys at hand are signed as a step asks, or were at some time, or are as they are published now.
func (d *derivation) signed(ctx context.Context, atHand func() bool, everSeen func([]id.Ed25519) bool) (bool, error) {
	if atHand() {
		return true, nil
	}
	if d.seen == nil {
		seen, err := d.caches.signers(ctx, d.data.Sender, d.data.SenderKey, d.data.SigningKey)
		if err != nil {
			return false, err
		}
		d.seen = seen
	}
	if everSeen(d.seen) {
		return true, nil
	}
	return d.usePublished(ctx, atHand)
}

// usePublished takes the published device keys instead of those at hand if they are of the same device and acceptable.
func (d *derivation) usePublished(ctx context.Context, acceptable func() bool) (bool, error) {
	published, err := d.cachedDevice(ctx)
	if err != nil || published == nil {
		return false, err
	}
	raw, keys := d.raw, d.keys
	if d.useDevice(published) && d.ownsSession() && acceptable() {
		return true, nil
	}
	d.raw, d.keys = raw, keys
	return false, nil
}

// deviceInfo ends the walk with the device known but not proven. The session keeps the copy of its keys that it was bound to only if that
// names somebody who has not signed it, for it may turn out to be forged; all that another one can prove is noted.
func (d *derivation) deviceInfo(askNow bool) (step, error) {
	d.data.State = StateDeviceInfo
	d.data.DeviceID = d.keys.DeviceID
	d.data.DeviceKeys = nil
	if d.noteSigners(); len(d.data.signers) < len(namedSigners(d.boundKeys)) {
		d.data.DeviceKeys = d.bound
	}
	return d.wait(askNow)
}

// The back-off of retries: 5 s doubling to 1 h, ±20 %, 12 scheduled tries. After that only a key query that somebody else
// makes leads on; nobody polls a server for ever.
const (
	firstBackoff = 5 * time.Second
	maxBackoff   = time.Hour
	maxRetries   = 12
)

// wait ends the walk with a time to look again: now when the sender's keys were never asked for, else by back-off.
func (d *derivation) wait(askNow bool) (step, error) {
	d.waits, d.asks = true, askNow
	d.schedule(&d.data)
	return nil, nil
}

// schedule sets when a claim whose walk waits is looked at again.
func (d *derivation) schedule(claim *SenderData) {
	if !d.queried && d.asks {
		claim.RetryCount, claim.NextRetry = 0, d.now
		return
	}
	claim.RetryCount++
	if claim.RetryCount > maxRetries {
		claim.NextRetry = time.Time{}
		return
	}
	jitter := d.jitter
	if jitter == 0 {
		jitter = 0.8 + 0.4*rand.Float64()
	}
	backoff := min(firstBackoff<<(claim.RetryCount-1), maxBackoff)
	claim.NextRetry = d.now.Add(time.Duration(float64(backoff) * jitter))
}

// conclude gives what the walk means for another claim of the same device, of which the same is known.
func (d *derivation) conclude(claim *SenderData) *SenderData {
	concluded := *claim
	concluded.State, concluded.Reason, concluded.signers = d.data.State, d.data.Reason, d.data.signers
	concluded.DeviceID, concluded.MasterKey, concluded.DeviceKeys = d.data.DeviceID, d.data.MasterKey, d.data.DeviceKeys
	concluded.Legacy = claim.Legacy && !d.data.State.proven()
	if d.waits {
		d.schedule(&concluded)
	} else {
		concluded.RetryCount, concluded.NextRetry = 0, time.Time{}
	}
	return &concluded
}
