package cryptohook

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/id"
)

// How a proof is checked. Nothing here knows a network, a database or a clock; the verdict is worked out by the same code as everywhere: the
// steps, and trustAnchor.verdict.

// ProofError says which field of a proof is wrong.
type ProofError struct {
	// Field is a path in the JSON, as verdict.code or device_keys.signatures["@alice:example.org"]; empty for the file as a whole.
	Field string
	// Fault is what is wrong with it, in English, as the end of a sentence that begins with the field.
	Fault string
}

func (e *ProofError) Error() string {
	if e.Field == "" {
		return "the file " + e.Fault
	}
	return e.Field + ": " + e.Fault
}

// ProofFact is something that a proof proves, or does not.
type ProofFact string

// What a proof can prove.
const (
	ProvenBot      ProofFact = "made_by_bot"        // the device that signed the file belongs to the bot with the master key that was given
	ProvenDevice   ProofFact = "device_keys"        // the keys are those of one device: it has signed them, and the session's are the same
	ProvenOwner    ProofFact = "device_of_identity" // the sender's identity has signed the device
	ProvenVerified ProofFact = "identity_verified"  // the bot has signed the sender's identity
	ProvenVerdict  ProofFact = "verdict"            // the verdict follows from what is in the file
)

// What no proof proves, or this one does not.
const (
	UnprovenText     ProofFact = "message_text"   // what the message says: whoever can read it could have written it
	UnprovenEvent    ProofFact = "event"          // that it is this event of this room: the bot's signature alone names them
	UnprovenOrigin   ProofFact = "session_origin" // that the session's key came from the device: only the bot saw that message
	UnprovenTimes    ProofFact = "times"          // the times are the bot's clock's and the homeserver's
	UnprovenHistory  ProofFact = "history"        // which identities the sender had before, and which of them was verified: the bot remembers
	UnprovenPerson   ProofFact = "person"         // who is behind the identity: nobody has verified it for the bot
	UnprovenOwner    ProofFact = "device_owner"   // that the device is the sender's: the sender's identity has not signed it
	UnprovenOutdated ProofFact = "up_to_date"     // that the keys were the sender's when the file was made: the bot's list was out of date
)

// ProofReport is what a proof that was checked says and proves.
type ProofReport struct {
	// RoomID, EventID, Sender and SentAt are the event's, as the bot's homeserver gave it.
	RoomID  id.RoomID
	EventID id.EventID
	Sender  id.UserID
	SentAt  time.Time
	// DeviceID, SenderKey and SigningKey are those of the device that made the session.
	DeviceID   id.DeviceID
	SenderKey  id.SenderKey
	SigningKey id.Ed25519
	SessionID  id.SessionID
	Source     Source
	// ReceivedAt is when the bot got the session's key; zero if it does not know.
	ReceivedAt time.Time
	// Code and State are the verdict, worked out anew. Outdated says that the bot knew its list of the sender's devices to be out of date.
	Code     Code
	State    State
	Outdated bool
	// MasterKey is the identity's that has signed the device; empty if none has.
	MasterKey id.Ed25519
	// TodaysMasterKey is the identity's that the sender had when the proof was made; empty if the bot knew none.
	TodaysMasterKey id.Ed25519
	FirstMasterKey  id.Ed25519
	// VerifiedBy is [VerifiedByPin] or [VerifiedBySignature] if the bot has verified today's identity. PinnedKey is what its configuration
	// pins, Withdrawn says that it has withdrawn its verification.
	VerifiedBy string
	PinnedKey  id.Ed25519
	Withdrawn  bool

	BotUserID    id.UserID
	BotDeviceID  id.DeviceID
	BotMasterKey id.Ed25519
	MadeAt       time.Time

	Proven, NotProven []ProofFact
	// Steps is the way from the device's keys (step D) to the state.
	Steps []Step
}

// VerifyProof checks a proof by the master key (unpadded base64) of the bot that is said to have made it. It needs no network and no
// database. It fails with [ProofError].
func VerifyProof(file []byte, botMasterKey id.Ed25519) (*ProofReport, error) {
	if len(file) > maxProof {
		return nil, &ProofError{"", fmt.Sprintf("is longer than %d bytes, which no proof is", maxProof)}
	}
	value, err := parseStrict(file)
	if fault, ok := errors.AsType[*jsonFault](err); ok {
		return nil, &ProofError{fault.path, fault.fault}
	} else if err != nil {
		return nil, &ProofError{"", err.Error()}
	}
	if err = proofShape.check("", value); err != nil {
		return nil, err
	}
	tree := value.(map[string]any)
	if err = checkSums(tree); err != nil {
		return nil, err
	}
	check := proofCheck{tree: tree, anchor: trustAnchor{masterKey: botMasterKey}}
	if err = json.Unmarshal(canonicalJSON(tree), &check.proofFile); err != nil {
		return nil, &ProofError{"", "cannot be read: " + err.Error()}
	}
	if check.Format != proofFormat {
		return nil, &ProofError{"format", "is not " + strconv.Quote(proofFormat) + ": the file is no proof"}
	}
	if check.Version != proofVersion {
		return nil, &ProofError{"version", fmt.Sprintf("is %d, and this program knows %d; a newer one may know it", check.Version, proofVersion)}
	}
	for _, part := range []func() error{check.bot, check.device, check.identities, check.verdict, check.signature} {
		if err = part(); err != nil {
			return nil, err
		}
	}
	return check.report(), nil
}

// check compares what a field holds with what it may hold.
func (s shape) check(path string, value any) error {
	fault := func(what string) error { return &ProofError{path, what} }
	switch s.kind {
	case shapeText:
		if text, ok := value.(string); !ok || text == "" || len(text) > 1024 {
			return fault("is not a text of a proper length")
		}
	case shapeKey:
		if text, ok := value.(string); !ok || !isCanonicalKey(text) {
			return fault("is not a key: 43 characters of base64, without padding")
		}
	case shapeInteger:
		if number, ok := value.(json.Number); !ok || number[0] == '-' {
			return fault("is not a number from 0 on")
		}
	case shapeFlag:
		if _, ok := value.(bool); !ok {
			return fault("is neither true nor false")
		}
	case shapeSigned:
		if _, ok := value.(map[string]any); !ok {
			return fault("is not an object")
		}
	case shapeTexts:
		return checkTexts(path, value)
	case shapeSignatures:
		return checkSignatures(path, value)
	default:
		return s.checkObject(path, value)
	}
	return nil
}

func (s shape) checkObject(path string, value any) error {
	object, ok := value.(map[string]any)
	if !ok {
		return &ProofError{path, "is not an object"}
	}
	for _, name := range slices.Sorted(maps.Keys(object)) {
		field, known := s.fields[name]
		if !known {
			return &ProofError{below(path, name), "is no field of a proof"}
		}
		if err := field.check(below(path, name), object[name]); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.fields)) {
		if _, there := object[name]; !there && !s.fields[name].optional {
			return &ProofError{below(path, name), "is missing"}
		}
	}
	return nil
}

func checkTexts(path string, value any) error {
	object, ok := value.(map[string]any)
	if !ok {
		return &ProofError{path, "is not an object"}
	}
	for _, name := range slices.Sorted(maps.Keys(object)) {
		if _, ok := object[name].(string); !ok {
			return &ProofError{below(path, name), "is not a text"}
		}
	}
	return nil
}

// checkSignatures wants one signature, of one user.
func checkSignatures(path string, value any) error {
	users, ok := value.(map[string]any)
	if !ok || len(users) != 1 {
		return &ProofError{path, "is not an object with the bot's user ID in it, and nobody else's"}
	}
	for user, of := range users {
		at := below(path, user)
		if keys, ok := of.(map[string]any); !ok || len(keys) != 1 {
			return &ProofError{at, "is not an object with one signature"}
		}
		return checkTexts(at, of)
	}
	return nil
}

// isCanonicalKey is isKey for files: of two texts that mean the same key only one is accepted.
func isCanonicalKey(text string) bool {
	key, err := base64.RawStdEncoding.Strict().DecodeString(text)
	return err == nil && len(key) == 32 && base64.RawStdEncoding.EncodeToString(key) == text
}

func checkSums(tree map[string]any) error {
	stored, _ := tree["checksums"].(map[string]any)
	sums := checksumsOf(tree)
	for _, path := range slices.Sorted(maps.Keys(sums)) {
		if stored[path] != sums[path] {
			return &ProofError{path, "was changed after the file was made: it does not fit its checksum"}
		}
	}
	for _, path := range slices.Sorted(maps.Keys(stored)) {
		if sums[path] == nil {
			return &ProofError{path, "was taken out of the file after it was made"}
		}
	}
	return nil
}

// proofCheck is a proof that is being checked, one part after the other.
type proofCheck struct {
	proofFile
	tree   map[string]any
	anchor trustAnchor

	botSigningKey id.Ed25519
	keys          *mautrix.DeviceKeys
	// today is the sender's identity, and prover the one that has signed the device: today's, an earlier one, or nil.
	today, prover *Identity
	judged        Verdict
	path          []byte
}

// bot checks that the chain ends in the bot's master key, and takes the bot's other keys from it.
func (c *proofCheck) bot() error {
	own := c.Bot.UserID
	c.anchor.userID = own
	masterKey, err := crossSigningKeyIn("bot.master_key", c.Bot.MasterKey, own, id.XSUsageMaster)
	if err != nil {
		return err
	}
	if masterKey != c.anchor.masterKey {
		return &ProofError{"bot.master_key", fmt.Sprintf("is %s, and not the master key that was given, %s: another bot has made this file, or somebody in its name", masterKey, c.anchor.masterKey)}
	}
	if c.anchor.selfSigningKey, err = signedKeyIn("bot.self_signing_key", c.Bot.SelfSigningKey, own, id.XSUsageSelfSigning, masterKey); err != nil {
		return err
	}
	if c.anchor.userSigningKey, err = signedKeyIn("bot.user_signing_key", c.Bot.UserSigningKey, own, id.XSUsageUserSigning, masterKey); err != nil {
		return err
	}
	keys, err := deviceKeysIn("bot.device_keys", c.Bot.DeviceKeys, own, c.Bot.DeviceID)
	if err != nil {
		return err
	}
	c.botSigningKey = keys.Keys.GetEd25519(c.Bot.DeviceID)
	return wantSignature("bot.device_keys", c.Bot.DeviceKeys, own, c.anchor.selfSigningKey)
}

// device checks the keys of the sender's device, and that the session is theirs (the owner check of step D).
func (c *proofCheck) device() (err error) {
	if c.keys, err = deviceKeysIn("device_keys", c.DeviceKeys, c.Event.Sender, c.Session.DeviceID); err != nil {
		return err
	}
	if key := c.keys.Keys.GetCurve25519(c.Session.DeviceID); key != c.Session.SenderKey {
		return &ProofError{"session.sender_key", fmt.Sprintf("is not the device's, which is %s", key)}
	}
	if key := c.keys.Keys.GetEd25519(c.Session.DeviceID); key != c.Session.SigningKey {
		return &ProofError{"session.signing_key", fmt.Sprintf("is not the device's, which is %s", key)}
	}
	return nil
}

// identities checks the sender's identities.
func (c *proofCheck) identities() (err error) {
	if c.Identity == nil {
		if c.Earlier != nil {
			return &ProofError{"identity", "is missing beside an earlier one"}
		}
		return nil
	}
	if c.today, err = c.identityIn("identity", &c.Identity.proofIdentity); err != nil {
		return err
	}
	facts := c.Identity
	c.today.FirstMasterKey, c.today.WasVerified, c.today.VerifiedBy = facts.FirstMasterKey, facts.WasVerified, facts.FormerlyVerifiedBy
	if facts.PinnedKey != "" {
		c.anchor.pins = map[id.UserID]id.Ed25519{c.Event.Sender: facts.PinnedKey}
		c.today.PinnedKey = facts.PinnedKey
	}
	if facts.FormerlyVerifiedBy == c.anchor.userSigningKey {
		return &ProofError{"identity.formerly_verified_by", "is the key that the bot has now: its signature belongs on the master key"}
	}
	if err = c.ourSignature(); err != nil {
		return err
	}
	c.prover = c.today
	if c.Earlier == nil {
		return nil
	}
	c.prover, err = c.identityIn("earlier_identity", c.Earlier)
	if err == nil && c.prover.MasterKey == c.today.MasterKey {
		return &ProofError{"earlier_identity.master_key", "is the one of today"}
	}
	return err
}

// ourSignature looks for the bot's signature on the sender's master key. A verdict that rests on it is not accepted without it.
func (c *proofCheck) ourSignature() error {
	signed := signedBy(c.Identity.MasterKey, c.anchor.userID, c.anchor.userSigningKey)
	_, names := signatureIn(c.Identity.MasterKey, c.anchor.userID, c.anchor.userSigningKey.String())
	rests := c.Verdict.Code == CodeVerified && c.Event.Sender != c.anchor.userID
	if !signed && (names || rests) {
		return &ProofError{
			signaturePath("identity.master_key", c.anchor.userID, c.anchor.userSigningKey.String()),
			"is not there, or not valid: the bot's signature is what makes the sender verified, whatever its configuration pins",
		}
	}
	if signed && !c.Identity.Withdrawn {
		c.today.VerifiedBy = c.anchor.userSigningKey
	}
	return nil
}

// identityIn checks the keys of an identity of the sender.
func (c *proofCheck) identityIn(path string, objects *proofIdentity) (*Identity, error) {
	identity := &Identity{UserID: c.Event.Sender}
	var err error
	if identity.MasterKey, err = crossSigningKeyIn(below(path, "master_key"), objects.MasterKey, c.Event.Sender, id.XSUsageMaster); err != nil {
		return nil, err
	}
	if objects.SelfSigningKey == nil {
		return identity, nil
	}
	identity.SelfSigningKey, err = signedKeyIn(below(path, "self_signing_key"), objects.SelfSigningKey, c.Event.Sender, id.XSUsageSelfSigning, identity.MasterKey)
	return identity, err
}

// verdict works out what the file's keys and signatures mean, and compares that with what the file says.
func (c *proofCheck) verdict() error {
	walk := derivation{
		caches: proofCaches{c}, anchor: c.anchor, queried: true, current: true, embedded: c.DeviceKeys, now: proofTime(c.MadeAt),
		data: SenderData{
			SessionID: c.Session.SessionID, RoomID: c.Event.RoomID, SenderKey: c.Session.SenderKey, SigningKey: c.Session.SigningKey,
			Sender: c.Event.Sender, Source: c.Session.Source,
		},
	}
	claim, err := walk.derive(context.Background())
	if err != nil {
		return &ProofError{"device_keys", "cannot be judged: " + err.Error()}
	}
	c.path = walk.path
	if c.prover != nil && c.Verdict.State.proven() && !claim.State.proven() {
		return &ProofError{
			signaturePath("device_keys", c.Event.Sender, c.prover.SelfSigningKey.String()),
			"is not there, or not valid: without it the device is not proven to be the sender's",
		}
	}
	c.judged = c.anchor.verdict(c.Event.Sender, c.Session.SessionID, []*SenderData{claim}, c.today)
	if c.judged.Code != c.Verdict.Code {
		return &ProofError{"verdict.code", fmt.Sprintf("is %s, and what is in the file makes it %s", c.Verdict.Code, c.judged.Code)}
	}
	if c.judged.State != c.Verdict.State {
		return &ProofError{"verdict.state", fmt.Sprintf("is %s, and what is in the file makes it %s", c.Verdict.State, c.judged.State)}
	}
	return nil
}

// proofCaches are what the steps may look at: what is in the file.
type proofCaches struct{ check *proofCheck }

func (p proofCaches) deviceByKey(context.Context, id.UserID, id.SenderKey, id.Ed25519) (json.RawMessage, error) {
	return p.check.DeviceKeys, nil
}

func (p proofCaches) identity(context.Context, id.UserID) (*Identity, error) {
	return p.check.prover, nil
}

func (p proofCaches) signers(context.Context, id.UserID, id.SenderKey, id.Ed25519) ([]id.Ed25519, error) {
	return nil, nil
}

// signature checks that the bot's device has signed all of the file.
func (c *proofCheck) signature() error {
	path := signaturePath("", c.Bot.UserID, c.Bot.DeviceID.String())
	text, there := c.Signatures[c.Bot.UserID]["ed25519:"+c.Bot.DeviceID.String()]
	if !there {
		return &ProofError{path, "is missing: the bot's device has not signed the file"}
	}
	signature, err := base64.RawStdEncoding.Strict().DecodeString(text)
	if err != nil || base64.RawStdEncoding.EncodeToString(signature) != text {
		return &ProofError{path, "is not a signature: 86 characters of base64, without padding"}
	}
	valid, err := signatures.VerifySignature(canonicalJSON(withoutFields(c.tree, "signatures")), c.botSigningKey, signature)
	if err != nil || !valid {
		return &ProofError{path, "does not fit the file: it, or something in the file, was changed after the file was made"}
	}
	return nil
}

// crossSigningKeyIn reads a cross-signing key of a proof.
func crossSigningKeyIn(path string, object json.RawMessage, userID id.UserID, usage id.CrossSigningUsage) (id.Ed25519, error) {
	key, err := parseCrossSigningKey(object, userID, usage)
	switch {
	case errors.Is(err, errOtherUser):
		return "", &ProofError{below(path, "user_id"), fmt.Sprintf("is not %s", userID)}
	case errors.Is(err, errWrongUsage):
		return "", &ProofError{below(path, "usage"), fmt.Sprintf("is not %s", usage)}
	case err != nil || !isCanonicalKey(key.String()):
		return "", &ProofError{below(path, "keys"), "is not one ed25519 key under its own name"}
	}
	return key, nil
}

// signedKeyIn reads a cross-signing key of a proof that the master key has to have signed.
func signedKeyIn(path string, object json.RawMessage, userID id.UserID, usage id.CrossSigningUsage, masterKey id.Ed25519) (id.Ed25519, error) {
	key, err := crossSigningKeyIn(path, object, userID, usage)
	if err != nil {
		return "", err
	}
	return key, wantSignature(path, object, userID, masterKey)
}

// deviceKeysIn reads device keys of a proof, and checks the device's own signature on them.
func deviceKeysIn(path string, object json.RawMessage, userID id.UserID, deviceID id.DeviceID) (*mautrix.DeviceKeys, error) {
	keys, err := parseDeviceKeys(object, userID, deviceID)
	switch {
	case errors.Is(err, errOtherUser):
		return nil, &ProofError{below(path, "user_id"), fmt.Sprintf("is not %s", userID)}
	case errors.Is(err, errOtherDevice):
		return nil, &ProofError{below(path, "device_id"), fmt.Sprintf("is not %s", deviceID)}
	case errors.Is(err, errSignatureInvalid):
		return nil, &ProofError{signaturePath(path, userID, deviceID.String()), "is not there, or does not fit the object: one of them was changed"}
	case err != nil:
		return nil, &ProofError{below(path, "keys"), "does not hold the device's curve25519 and ed25519 keys"}
	}
	return keys, nil
}

func wantSignature(path string, object json.RawMessage, userID id.UserID, key id.Ed25519) error {
	if signedBy(object, userID, key) {
		return nil
	}
	return &ProofError{signaturePath(path, userID, key.String()), "is not there, or does not fit the object: one of them was changed"}
}

func signaturePath(path string, userID id.UserID, keyName string) string {
	return below(below(below(path, "signatures"), userID.String()), "ed25519:"+keyName)
}

// signatureIn gives the signature that an object names, be it valid or not.
func signatureIn(object json.RawMessage, userID id.UserID, keyName string) (signature any, there bool) {
	var signed struct {
		Signatures map[id.UserID]map[string]any `json:"signatures"`
	}
	if json.Unmarshal(object, &signed) != nil {
		return nil, false
	}
	signature, there = signed.Signatures[userID]["ed25519:"+keyName]
	return signature, there
}

func (c *proofCheck) report() *ProofReport {
	report := &ProofReport{
		RoomID: c.Event.RoomID, EventID: c.Event.EventID, Sender: c.Event.Sender, SentAt: proofTime(c.Event.SentAt),
		DeviceID: c.Session.DeviceID, SenderKey: c.Session.SenderKey, SigningKey: c.Session.SigningKey, SessionID: c.Session.SessionID,
		Source: c.Session.Source, ReceivedAt: proofTime(c.Session.ReceivedAt),
		Code: c.judged.Code, State: c.judged.State, Outdated: c.Verdict.Outdated, MasterKey: c.judged.MasterKey,
		BotUserID: c.Bot.UserID, BotDeviceID: c.Bot.DeviceID, BotMasterKey: c.anchor.masterKey, MadeAt: proofTime(c.MadeAt),
		Proven: []ProofFact{ProvenBot, ProvenDevice}, NotProven: []ProofFact{UnprovenText, UnprovenEvent, UnprovenOrigin, UnprovenTimes},
	}
	if c.today != nil {
		report.TodaysMasterKey, report.FirstMasterKey = c.today.MasterKey, c.today.FirstMasterKey
		report.VerifiedBy = c.anchor.verifiedBy(c.today)
		report.PinnedKey, report.Withdrawn = c.Identity.PinnedKey, c.Identity.Withdrawn
	}
	if c.judged.State.proven() {
		report.Proven = append(report.Proven, ProvenOwner)
		report.NotProven = append(report.NotProven, UnprovenHistory)
	} else {
		report.NotProven = append(report.NotProven, UnprovenOwner)
	}
	if c.judged.State == StateSenderVerified && c.Event.Sender != c.anchor.userID {
		report.Proven = append(report.Proven, ProvenVerified)
	} else if c.Event.Sender != c.anchor.userID {
		report.NotProven = append(report.NotProven, UnprovenPerson)
	}
	if c.Verdict.Outdated {
		report.NotProven = append(report.NotProven, UnprovenOutdated)
	}
	report.Proven = append(report.Proven, ProvenVerdict)
	claim := &SenderData{State: c.judged.State, MasterKey: c.judged.MasterKey, Source: c.Session.Source}
	// How the bot got the keys is not in the file.
	report.Steps = slices.DeleteFunc(stepsOf(claim, c.today, c.path), func(step Step) bool { return step.Letter < "D" })
	return report
}
