package cryptohook

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/id"
)

// Identity is what we know of a user's cross-signing identity. Every key in it was checked when it was received.
type Identity struct {
	UserID id.UserID
	// MasterKey is today's master key (unpadded base64), empty when the user has none.
	MasterKey id.Ed25519
	// FirstMasterKey is the first master key that we ever saw of this user.
	FirstMasterKey id.Ed25519
	// SelfSigningKey is signed by MasterKey; empty when there is none that is.
	SelfSigningKey id.Ed25519
	// VerifiedBy is the user-signing key of ours whose signature on MasterKey was checked; empty when there is none.
	VerifiedBy id.Ed25519
	// WasVerified says that some master key of this user was verified at some time, and that nobody has withdrawn it.
	WasVerified bool
	// PinnedKey is the master key that the configuration pinned when the identity was last judged; empty when it pinned none.
	PinnedKey id.Ed25519
}

// trustAnchor is where every chain of trust ends: our own identity, whose private keys we hold, and the master keys that
// the configuration pins.
type trustAnchor struct {
	userID         id.UserID
	masterKey      id.Ed25519
	selfSigningKey id.Ed25519
	userSigningKey id.Ed25519
	pins           map[id.UserID]id.Ed25519
}

// Standing is what a user's identity is worth to us now.
type Standing string

const (
	StandingUnverified Standing = "unverified"
	// StandingViolation: verified once, or pinned to another key, and not verified now.
	StandingViolation Standing = "violation"
	StandingVerified  Standing = "verified"
)

// judge says whether the user's identity is verified now, by our user-signing key's signature on today's master key. A pin
// to another key outranks any signature. A verification that we withdraw is no violation; a master key that we have not verified,
// in the place of one that we had, is.
func (a trustAnchor) judge(identity *Identity) Standing {
	if identity == nil || identity.MasterKey == "" {
		return StandingUnverified
	}
	if identity.UserID == a.userID {
		switch {
		case identity.MasterKey == a.masterKey:
			return StandingVerified
		case a.masterKey == "" && !identity.WasVerified:
			return StandingUnverified
		default:
			return StandingViolation
		}
	}
	pin, pinned := a.pins[identity.UserID]
	switch {
	case pinned && pin != identity.MasterKey:
		return StandingViolation
	case a.userSigningKey != "" && identity.VerifiedBy == a.userSigningKey:
		return StandingVerified
	case identity.VerifiedBy != "":
		// It is still the master key that was verified. We have given up the key that we signed it with.
		return StandingUnverified
	case identity.WasVerified:
		return StandingViolation
	default:
		return StandingUnverified
	}
}

// needsSignature says that the user's master key is pinned, and that we have not signed it yet.
func (a trustAnchor) needsSignature(identity *Identity) bool {
	return identity != nil && identity.MasterKey != "" && identity.UserID != a.userID && a.userSigningKey != "" &&
		a.pins[identity.UserID] == identity.MasterKey && identity.VerifiedBy != a.userSigningKey
}

// stateOf says what a session is worth now that was proven to be signed by masterKey's identity (step J, and every verdict).
func (a trustAnchor) stateOf(masterKey id.Ed25519, identity *Identity) State {
	switch a.judge(identity) {
	case StandingVerified:
		if masterKey == identity.MasterKey {
			return StateSenderVerified
		}
		// The user was reset since and verified again: what the old identity signed is no longer vouched for.
		return StateSenderUnverified
	case StandingViolation:
		return StateVerificationViolation
	default:
		return StateSenderUnverified
	}
}

// adopts says whether what an earlier identity proved is proven by today's as well, if that has signed the device too: when today's is
// verified, or is the one that we saw first. Else the session stays with the identity that people knew when they read its messages.
func (a trustAnchor) adopts(identity *Identity) bool {
	switch a.judge(identity) {
	case StandingVerified:
		return true
	case StandingUnverified:
		return identity.MasterKey == identity.FirstMasterKey
	default:
		return false
	}
}

// Faults of published keys. They are logged; the keys are not used.
var (
	errNotOneKey         = errors.New("the object does not hold exactly one ed25519 key under its own name")
	errOtherUser         = errors.New("the object belongs to another user")
	errWrongUsage        = errors.New("the object is published for another usage")
	errOtherDevice       = errors.New("the object belongs to another device")
	errNotAKey           = errors.New("the object holds a key that is not 32 bytes in unpadded base64")
	errLongDeviceID      = errors.New("the object has a device ID that is too long to be stored")
	errKeyMissing        = errors.New("the object lacks the device's curve25519 or ed25519 key")
	errSignatureInvalid  = errors.New("the signature is not valid")
	errSigningKeyChanged = errors.New("the device published another ed25519 key before")
)

// parseCrossSigningKey checks a cross-signing key object's form: user, usage, and the key it holds.
// https://spec.matrix.org/v1.16/client-server-api/#post_matrixclientv3keysquery (CrossSigningKey)
func parseCrossSigningKey(raw json.RawMessage, userID id.UserID, usage id.CrossSigningUsage) (id.Ed25519, error) {
	var object mautrix.CrossSigningKeys
	if err := json.Unmarshal(raw, &object); err != nil {
		return "", fmt.Errorf("failed to parse %s key: %w", usage, err)
	}
	if object.UserID != userID {
		return "", fmt.Errorf("%s key: %w", usage, errOtherUser)
	}
	if len(object.Usage) != 1 || object.Usage[0] != usage {
		return "", fmt.Errorf("%s key: %w", usage, errWrongUsage)
	}
	key := object.FirstKey()
	if len(object.Keys) != 1 || key == "" || object.Keys[id.NewKeyID(id.KeyAlgorithmEd25519, key.String())] != key {
		return "", fmt.Errorf("%s key: %w", usage, errNotOneKey)
	}
	if !isKey(key.String()) {
		return "", fmt.Errorf("%s key: %w", usage, errNotAKey)
	}
	return key, nil
}

// isKey says whether a text is a key as they are written. What else is published for one fits into no table.
func isKey(text string) bool {
	raw, err := base64.RawStdEncoding.DecodeString(text)
	return err == nil && len(raw) == 32 && len(text) == base64.RawStdEncoding.EncodedLen(32)
}

// signedBy says whether the JSON object carries a valid signature of the cross-signing key of that user.
func signedBy(object json.RawMessage, userID id.UserID, key id.Ed25519) bool {
	if len(object) == 0 || key == "" {
		return false
	}
	valid, err := signatures.VerifySignatureJSON(object, userID, key.String(), key)
	return err == nil && valid
}

// maxDeviceID is more than any homeserver gives, in bytes. PostgreSQL's indices take no long texts.
const maxDeviceID = 512

// parseDeviceKeys checks a published device keys object: its owner, its keys, and the device's own signature.
// https://spec.matrix.org/v1.16/client-server-api/#post_matrixclientv3keysquery (DeviceInformation)
func parseDeviceKeys(raw json.RawMessage, userID id.UserID, deviceID id.DeviceID) (*mautrix.DeviceKeys, error) {
	var keys mautrix.DeviceKeys
	if err := json.Unmarshal(raw, &keys); err != nil {
		return nil, fmt.Errorf("failed to parse device keys: %w", err)
	}
	if keys.UserID != userID {
		return nil, errOtherUser
	}
	if keys.DeviceID != deviceID {
		return nil, errOtherDevice
	}
	signingKey := keys.Keys.GetEd25519(deviceID)
	identityKey := keys.Keys.GetCurve25519(deviceID)
	switch {
	case signingKey == "" || identityKey == "":
		return nil, errKeyMissing
	case !isKey(signingKey.String()) || !isKey(identityKey.String()):
		return nil, errNotAKey
	case len(deviceID) > maxDeviceID:
		return nil, errLongDeviceID
	}
	valid, err := signatures.VerifySignatureJSON(raw, userID, deviceID.String(), signingKey)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errSignatureInvalid, err)
	} else if !valid {
		return nil, errSignatureInvalid
	}
	return &keys, nil
}

// maxSigners is how many signatures on a device are looked at. It has one, or two while its owner's self-signing key is replaced.
const maxSigners = 8

// namedSigners gives the ed25519 keys, in order, that a device keys object names as signers in its user's name, besides the device itself.
func namedSigners(keys *mautrix.DeviceKeys) []id.Ed25519 {
	var named []id.Ed25519
	for keyID := range keys.Signatures[keys.UserID] {
		if algorithm, name := keyID.Parse(); algorithm == id.KeyAlgorithmEd25519 && name != keys.DeviceID.String() {
			named = append(named, id.Ed25519(name))
		}
	}
	slices.Sort(named)
	return named
}

// validSigners gives those of the named signers that are asked for whose signatures are valid, the one that matters most at first.
func validSigners(raw json.RawMessage, keys *mautrix.DeviceKeys, first id.Ed25519, asked func(id.Ed25519) bool) []id.Ed25519 {
	var valid []id.Ed25519
	named := namedSigners(keys)
	if i := slices.Index(named, first); i > 0 {
		named = slices.Concat(named[i:i+1], named[:i], named[i+1:])
	}
	for i, signer := range named {
		if i < maxSigners && isKey(signer.String()) && asked(signer) && signedBy(raw, keys.UserID, signer) {
			valid = append(valid, signer)
		}
	}
	return valid
}

// publishedIdentity is a user's part of a /keys/query response, checked.
type publishedIdentity struct {
	masterKey, selfSigningKey id.Ed25519
	verifiedBy                id.Ed25519
}

// readIdentity checks the cross-signing keys that a /keys/query response has for a user. It returns nil when there is no
// usable master key.
func (a trustAnchor) readIdentity(userID id.UserID, master, selfSigning json.RawMessage) (*publishedIdentity, error) {
	if len(master) == 0 {
		return nil, nil
	}
	masterKey, err := parseCrossSigningKey(master, userID, id.XSUsageMaster)
	if err != nil {
		return nil, err
	}
	published := &publishedIdentity{masterKey: masterKey}
	if signedBy(master, a.userID, a.userSigningKey) {
		published.verifiedBy = a.userSigningKey
	}
	if len(selfSigning) == 0 {
		return published, nil
	}
	selfSigningKey, err := parseCrossSigningKey(selfSigning, userID, id.XSUsageSelfSigning)
	if err != nil {
		return published, err
	}
	if !signedBy(selfSigning, userID, masterKey) {
		return published, fmt.Errorf("%s key: %w", id.XSUsageSelfSigning, errSignatureInvalid)
	}
	published.selfSigningKey = selfSigningKey
	return published, nil
}

// merge brings a newly published identity into what we knew. Nothing that was verified is forgotten. A server that leaves the
// self-signing key out, or shows one that the master key has not signed, tells nothing about it: only another one takes its place.
// withdrawn says that the verification of the published master key was withdrawn, so that our signature on it does not count.
func (identity *Identity) merge(published *publishedIdentity, withdrawn bool) {
	if identity.MasterKey != published.masterKey {
		identity.VerifiedBy, identity.SelfSigningKey = "", ""
	}
	if identity.FirstMasterKey == "" {
		identity.FirstMasterKey = published.masterKey
	}
	identity.MasterKey = published.masterKey
	if published.selfSigningKey != "" {
		identity.SelfSigningKey = published.selfSigningKey
	}
	if published.verifiedBy != "" && !withdrawn {
		identity.VerifiedBy = published.verifiedBy
		identity.WasVerified = true
	}
}
