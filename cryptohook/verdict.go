package cryptohook

import (
	"fmt"
	"slices"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Code is what a message is worth, in one word.
type Code string

const (
	// CodeVerified: the sender is proven, and we verified this person.
	CodeVerified Code = "verified"
	// CodeUnverifiedIdentity: the sender is proven, and nobody verified this person for us.
	CodeUnverifiedIdentity Code = "unverified_identity"
	// CodeIdentityChanged: the sender is proven, but by another master key than the first that we saw, or than today's.
	CodeIdentityChanged Code = "identity_changed"
	// CodeVerificationViolation: we verified this user once, and today's identity is not the verified one.
	CodeVerificationViolation Code = "verification_violation"
	// CodeUnsignedDevice: we know the device's keys, but its owner's identity does not vouch for it.
	CodeUnsignedDevice Code = "unsigned_device"
	// CodeUnknownDevice: the key came directly, from a device of which nothing is known.
	CodeUnknownDevice Code = "unknown_device"
	// CodeAuthenticityNotGuaranteed: the key came over others, or its device is not the one that it claims to be from.
	CodeAuthenticityNotGuaranteed Code = "authenticity_not_guaranteed"
	// CodeMismatchedSender: the event's sender is not the session's owner, or the message was sent before.
	CodeMismatchedSender Code = "mismatched_sender"
	// CodeSessionConflict: two devices claim to have made the session.
	CodeSessionConflict Code = "session_conflict"
	// CodeSessionRejected: the device's keys carry a forged signature (step H). The content is not shown.
	CodeSessionRejected Code = "session_rejected"
	// CodeSentInClear: a plaintext event in an encrypted room.
	CodeSentInClear Code = "sent_in_clear"
	// CodeUnableToDecrypt: there is no key, or the message is broken; [Verdict].Reason says which.
	CodeUnableToDecrypt Code = "unable_to_decrypt"
	// CodeNotEncrypted: the room is not encrypted.
	CodeNotEncrypted Code = "not_encrypted"
)

// Shield is the colour of the warning that a client shows beside a message.
type Shield string

const (
	ShieldNone Shield = "none"
	ShieldGrey Shield = "grey"
	ShieldRed  Shield = "red"
)

// shields gives the lax and the strict shield of each code, as the Matrix Rust SDK defines the two modes.
var shields = map[Code][2]Shield{
	CodeVerified:                  {ShieldNone, ShieldNone},
	CodeUnverifiedIdentity:        {ShieldNone, ShieldRed},
	CodeIdentityChanged:           {ShieldGrey, ShieldRed},
	CodeVerificationViolation:     {ShieldRed, ShieldRed},
	CodeUnsignedDevice:            {ShieldRed, ShieldRed},
	CodeUnknownDevice:             {ShieldRed, ShieldRed},
	CodeAuthenticityNotGuaranteed: {ShieldGrey, ShieldRed},
	CodeMismatchedSender:          {ShieldRed, ShieldRed},
	CodeSessionConflict:           {ShieldRed, ShieldRed},
	CodeSessionRejected:           {ShieldRed, ShieldRed},
	CodeSentInClear:               {ShieldRed, ShieldRed},
	CodeUnableToDecrypt:           {ShieldRed, ShieldRed},
	CodeNotEncrypted:              {ShieldNone, ShieldGrey},
}

// LaxShield is the shield that a client shows by default.
func (c Code) LaxShield() Shield { return shields[c][0] }

// StrictShield is the shield for people who accept nobody whom they have not verified.
func (c Code) StrictShield() Shield { return shields[c][1] }

// Reasons of [CodeUnableToDecrypt] besides the withheld codes of the specification (m.blacklisted, m.unverified, …), and of
// [CodeMismatchedSender].
const (
	ReasonUnknownSession       = "unknown_session"       // no key has come
	ReasonUnknownIndex         = "unknown_message_index" // the key that came is for later messages only
	ReasonKeyDeleted           = "key_deleted"           // the key was there, and was deleted
	ReasonWrongRoom            = "wrong_room"            // the message says that it was made for another room
	ReasonUnsupportedAlgorithm = "unsupported_algorithm"
	ReasonMalformed            = "malformed"
	ReasonOtherSender          = "other_sender" // sent on by somebody who is not the session's owner
	ReasonReplayed             = "replayed"     // the message index was used by another event
)

// Claimant is one of the devices that claim a session.
type Claimant struct {
	UserID    id.UserID
	DeviceID  id.DeviceID
	SenderKey id.SenderKey
}

// Verdict says who sent a message, and how sure that is. Fields that are not known are empty.
type Verdict struct {
	EventID id.EventID
	Code    Code
	// State is the sender data's state as the sender's identity stands now.
	State State
	// UserID, DeviceID and MasterKey (unpadded base64) are those of the session's owner: proven from
	// [StateVerificationViolation] on, claimed below it.
	UserID    id.UserID
	DeviceID  id.DeviceID
	MasterKey id.Ed25519
	SessionID id.SessionID
	// Source says how the session's key came to us.
	Source Source
	// SourceUser is who gave the key, for [SourceHistoryBundle]: all that is known of the sender is this user's word.
	SourceUser id.UserID
	// Legacy is true for sessions that came without any information about their sender.
	Legacy bool
	// Reason says why a message could not be decrypted, or how its sender does not match.
	Reason string
	// Claimants are the devices that claim the session, when there is more than one.
	Claimants []Claimant
	// Outdated says that the sender's device list was known to be out of date when the verdict was due.
	Outdated bool
	// Late says that the handler saw this event before, when its key had not come: [CodeUnableToDecrypt] was its verdict then.
	Late bool
	// ContentWithheld says that the event was not decrypted for the handler: its trust is below the requirement.
	ContentWithheld bool
}

// mayComeLate says that the message may be decrypted yet, once a key comes. What is broken, or from another room, stays so.
func (v Verdict) mayComeLate() bool {
	if v.Code != CodeUnableToDecrypt || v.SessionID == "" {
		return false
	}
	switch v.Reason {
	case ReasonMalformed, ReasonWrongRoom, ReasonUnsupportedAlgorithm:
		return false
	default:
		return true
	}
}

// undecrypted says that the message was not decrypted, or need not have been.
func (v Verdict) undecrypted() bool {
	switch v.Code {
	case CodeUnableToDecrypt, CodeSentInClear, CodeNotEncrypted, CodeSessionRejected, CodeMismatchedSender:
		return true
	default:
		return false
	}
}

// verdictKey is where a verdict hangs on its event. JSON cannot forge it: what comes from there is never an *attached.
const verdictKey = "dev.sendertrust.verdict"

type attached struct{ verdict Verdict }

// MarshalJSON keeps the verdict out of events that are sent on.
func (*attached) MarshalJSON() ([]byte, error) { return []byte("null"), nil }

func attach(evt *event.Event, verdict Verdict) {
	evt.Content.GetRaw()[verdictKey] = &attached{verdict}
	evt.Mautrix.TrustState = verdict.trustState()
	evt.Mautrix.TrustSource = nil
}

// VerdictOf gives the verdict on an event that the hook handed to a handler. It says false for events that did not pass the
// hook; those must be treated as unproven.
func VerdictOf(evt *event.Event) (Verdict, bool) {
	a, ok := evt.Content.Raw[verdictKey].(*attached)
	if !ok {
		return Verdict{}, false
	}
	return a.verdict, true
}

// trustState says the verdict in mautrix's terms, for handlers that look there.
func (v Verdict) trustState() id.TrustState {
	switch v.Code {
	case CodeVerified:
		return id.TrustStateCrossSignedVerified
	case CodeUnverifiedIdentity:
		return id.TrustStateCrossSignedTOFU
	case CodeIdentityChanged, CodeVerificationViolation:
		return id.TrustStateCrossSignedUntrusted
	case CodeUnknownDevice:
		return id.TrustStateUnknownDevice
	case CodeAuthenticityNotGuaranteed:
		return id.TrustStateForwarded
	default:
		return id.TrustStateUnset
	}
}

// TrustRequirement is the trust below which content is withheld from handlers, as the Matrix Rust SDK defines it.
type TrustRequirement string

const (
	// RequireNothing hands everything on that can be decrypted.
	RequireNothing TrustRequirement = "untrusted"
	// RequireCrossSignedOrLegacy lets legacy sessions pass, of which nothing could be known.
	RequireCrossSignedOrLegacy TrustRequirement = "cross_signed_or_legacy"
	// RequireCrossSigned hands on only what a proven sender sent.
	RequireCrossSigned TrustRequirement = "cross_signed"
)

// check fails for a word that is no requirement: nothing would be withheld by it. The empty one means [RequireNothing].
func (r TrustRequirement) check() error {
	switch r {
	case "", RequireNothing, RequireCrossSignedOrLegacy, RequireCrossSigned:
		return nil
	default:
		return fmt.Errorf("cryptohook: %q is not a trust requirement: use %s, %s or %s", string(r), RequireNothing, RequireCrossSignedOrLegacy, RequireCrossSigned)
	}
}

// allows says whether content with that verdict may be shown.
func (r TrustRequirement) allows(v Verdict) bool {
	switch v.Code {
	case CodeSessionRejected, CodeUnableToDecrypt:
		return false
	case CodeNotEncrypted:
		// Nothing in the room is proven, and everybody knows it.
		return true
	case CodeSentInClear:
		// Anybody with access to a server could have written it. The reference does not judge plaintext at all.
		return r != RequireCrossSigned && r != RequireCrossSignedOrLegacy
	}
	switch r {
	case RequireCrossSigned:
		return v.Code == CodeVerified || v.Code == CodeUnverifiedIdentity || v.Code == CodeIdentityChanged
	case RequireCrossSignedOrLegacy:
		return v.Code == CodeVerified || v.Code == CodeUnverifiedIdentity || v.Code == CodeIdentityChanged ||
			v.Legacy && (v.Code == CodeUnsignedDevice || v.Code == CodeUnknownDevice || v.Code == CodeAuthenticityNotGuaranteed)
	default:
		return true
	}
}

// verdict judges a message of sender by the claims on its session and by what the owner's identity is worth now.
// Claims are those of one session ID in the event's room, without gaps: an empty list means a session that came without
// sender data. The identity is that of the first claim's sender.
func (a trustAnchor) verdict(sender id.UserID, sessionID id.SessionID, claims []*SenderData, identity *Identity) Verdict {
	if len(claims) == 0 {
		return Verdict{Code: CodeAuthenticityNotGuaranteed, State: StateUnknownDevice, SessionID: sessionID, Legacy: true}
	}
	owner, others := claims[0], claims[1:]
	v := Verdict{
		SessionID: sessionID, State: owner.State, UserID: owner.Sender, DeviceID: owner.DeviceID, MasterKey: owner.MasterKey,
		Source: owner.Source, Legacy: owner.Legacy,
	}
	if owner.State.proven() {
		v.State = a.stateOf(owner.MasterKey, identity)
	}
	switch {
	case len(others) > 0 && !slices.ContainsFunc(claims, func(claim *SenderData) bool { return claim.Sender == "" || claim.Sender == sender }):
		v.Code, v.Reason = CodeMismatchedSender, ReasonOtherSender
	case len(others) > 0:
		v.Code = CodeSessionConflict
		for _, claim := range claims {
			v.Claimants = append(v.Claimants, Claimant{claim.Sender, claim.DeviceID, claim.SenderKey})
		}
	case owner.State == StateRejected:
		v.Code = CodeSessionRejected
	case owner.Sender != "" && owner.Sender != sender:
		v.Code, v.Reason = CodeMismatchedSender, ReasonOtherSender
	default:
		v.Code = codeOf(v.State, owner, identity)
	}
	return v
}

func codeOf(state State, owner *SenderData, identity *Identity) Code {
	switch state {
	case StateSenderVerified:
		return CodeVerified
	case StateVerificationViolation:
		return CodeVerificationViolation
	case StateSenderUnverified:
		if identity == nil || owner.MasterKey != identity.MasterKey || owner.MasterKey != identity.FirstMasterKey {
			return CodeIdentityChanged
		}
		return CodeUnverifiedIdentity
	case StateDeviceInfo:
		return CodeUnsignedDevice
	default:
		if owner.Source == SourceDirect && owner.Reason != reasonOwnerCheckFailed {
			return CodeUnknownDevice
		}
		return CodeAuthenticityNotGuaranteed
	}
}

// livingClaims leaves out rejected claims when there are others: a forger cannot cast doubt on a session by claiming it.
func livingClaims[C interface{ isRejected() bool }](claims []C) []C {
	var living []C
	for _, claim := range claims {
		if !claim.isRejected() {
			living = append(living, claim)
		}
	}
	if len(living) == 0 {
		return claims[:min(len(claims), 1)]
	}
	return living
}

func (sd *SenderData) isRejected() bool { return sd.State == StateRejected }
