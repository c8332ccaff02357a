package cryptohook

import (
	"database/sql"
	"encoding/json"
	"slices"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// State says how much is proven about the device that sent a Megolm session. The names are those of the Matrix Rust
// SDK's SenderData, so that users who know one know the other.
type State string

const (
	// StateUnknownDevice: there are no device keys yet, or the device that we know does not own the session.
	StateUnknownDevice State = "unknown_device"
	// StateDeviceInfo: we have the device's keys, but they are not cross-signed by an identity that we know.
	StateDeviceInfo State = "device_info"
	// StateVerificationViolation: a proven sender who was verified once and is not verified now.
	StateVerificationViolation State = "verification_violation"
	// StateSenderUnverified: a proven sender whom we never verified.
	StateSenderUnverified State = "sender_unverified"
	// StateSenderVerified: a proven sender whom we verified.
	StateSenderVerified State = "sender_verified"
	// StateRejected: the device keys carry an invalid signature (step H). The session key is gone; the row says why.
	StateRejected State = "rejected"
)

// rank orders the states by trust. A rejected claim has none.
func (s State) rank() int {
	switch s {
	case StateUnknownDevice:
		return 1
	case StateDeviceInfo:
		return 2
	case StateVerificationViolation:
		return 3
	case StateSenderUnverified:
		return 4
	case StateSenderVerified:
		return 5
	default:
		return 0
	}
}

// proven says whether the chain device ← self-signing key ← master key held (step J was reached).
func (s State) proven() bool {
	return s.rank() >= StateVerificationViolation.rank()
}

// Source says how a session key came to us.
type Source string

const (
	SourceDirect        Source = "direct"         // an m.room_key from the sender's own device
	SourceForwarded     Source = "forwarded"      // an m.forwarded_room_key
	SourceBackup        Source = "backup"         // the server-side key backup
	SourceImport        Source = "import"         // a key export file, or a way that mautrix does not name
	SourceHistoryBundle Source = "history_bundle" // MSC4268
)

func sourceOf(source id.KeySource) Source {
	switch source {
	case id.KeySourceDirect:
		return SourceDirect
	case id.KeySourceForward:
		return SourceForwarded
	case id.KeySourceBackup:
		return SourceBackup
	case keySourceBundle:
		return SourceHistoryBundle
	default:
		return SourceImport
	}
}

// Why a row is in its state, where the state alone does not say it.
const (
	reasonOwnerCheckFailed = "owner_check_failed"
	reasonForgedSignature  = "the self-signing key's signature on the device keys is not valid"
)

// SenderData is what is stored about who sent one Megolm session: one claim of one device.
type SenderData struct {
	SessionID id.SessionID
	RoomID    id.RoomID
	// SenderKey (curve25519) and SigningKey (ed25519) are those of the Olm message that brought the key.
	SenderKey  id.SenderKey
	SigningKey id.Ed25519
	// Sender is the MXID of the Olm message that brought the key. It is a claim until the state is proven.
	Sender id.UserID
	Source Source
	// Legacy is true only for sessions that came without this information.
	Legacy bool

	State  State
	Reason string
	// DeviceID is set from StateDeviceInfo on, MasterKey (unpadded base64) in the proven states.
	DeviceID  id.DeviceID
	MasterKey id.Ed25519
	// DeviceKeys is the device keys object with its signatures, kept only while the device is not proven.
	DeviceKeys json.RawMessage
	// Embedded says whether the message that brought the key held the device's keys (MSC4147), where that is recorded.
	Embedded sql.NullBool

	RetryCount int
	// NextRetry is when the resolver looks again; zero when nothing is scheduled.
	NextRetry  time.Time
	ReceivedAt time.Time
	UpdatedAt  time.Time

	// signers are the keys whose signatures on the device keys were checked on the way, to be noted with the row.
	signers []signer
}

// signer is a key that has signed a device, and the device keys object that its signature is in, if that is at hand.
type signer struct {
	key    id.Ed25519
	object json.RawMessage
}

func isSigner(signers []signer, key id.Ed25519) bool {
	return slices.ContainsFunc(signers, func(s signer) bool { return s.key == key })
}

// awaitsFirstLook says that the sender's keys are about to be asked for and never were: the state may change at once.
func (sd *SenderData) awaitsFirstLook() bool {
	return !sd.NextRetry.IsZero() && sd.RetryCount == 0
}

// deviceInfo gives the keys of the device that made the session, as they came, or as they are known from the row: without
// signatures.
func (sd *SenderData) deviceInfo() json.RawMessage {
	if sd.DeviceKeys != nil || sd.State != StateDeviceInfo {
		return sd.DeviceKeys
	}
	bare, err := json.Marshal(&mautrix.DeviceKeys{
		UserID: sd.Sender, DeviceID: sd.DeviceID,
		Keys: mautrix.KeyMap{
			id.NewDeviceKeyID(id.KeyAlgorithmCurve25519, sd.DeviceID): sd.SenderKey.String(),
			id.NewDeviceKeyID(id.KeyAlgorithmEd25519, sd.DeviceID):    sd.SigningKey.String(),
		},
	})
	if err != nil {
		return nil
	}
	return bare
}

// mergeSenderData decides between what is stored of a claim and what the same device's key brings now. The ratchets that come with
// them are compared apart from this: whoever has the better one, what is known of the session's sender stays known.
//
// The more trusted one stays, except that only proof undoes a rejection. At equal trust the reference keeps the stored one, unless a
// better ratchet comes with the other. Here the newer one is taken if it came directly: it holds the sender's device keys as they are
// now. What the other copy of them proves is not lost by that: every signature is noted when it comes. A copy that names somebody who has
// not signed it stays, though, until it is known whether it is forged: nobody gets rid of it by sending another. What somebody else
// exported never counts beside anything.
func mergeSenderData(stored, arrived *SenderData) *SenderData {
	switch {
	case stored == nil:
		return arrived
	case arrived.Source != SourceDirect:
		return stored
	case stored.State == StateRejected && !arrived.State.proven():
		return stored
	case arrived.State == StateRejected:
		// A forged copy cannot take away what was proven, but it does condemn what was not.
		if stored.State.proven() {
			return stored
		}
		return arrived
	case stored.State.rank() > arrived.State.rank():
		return stored
	case stored.State == arrived.State && stored.DeviceKeys != nil && arrived.DeviceKeys == nil:
		return stored
	default:
		return arrived
	}
}
