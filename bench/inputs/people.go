// Package inputs makes what a benchmark feeds a receiver with: people with cross-signed devices, the room keys and messages that these
// send, and the homeserver between them and the receiver, in the same process. Everything is signed and encrypted with mautrix's own
// cryptography, as real clients do it.
package inputs

import (
	"encoding/json"
	"fmt"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// object is a JSON object before it is written.
type object = map[string]any

// Must gives the value, and ends the program on an error: a benchmark has nothing to go on with.
func Must[T any](value T, err error) T {
	Check(err)
	return value
}

// Check ends the program on an error.
func Check(err error) {
	if err != nil {
		panic(err)
	}
}

func rawJSON(value any) json.RawMessage { return Must(json.Marshal(value)) }

// jsonSigner is what Olm accounts and cross-signing keys have in common.
type jsonSigner interface{ SignJSON(any) (string, error) }

// sign adds a signature as the specification wants it.
// https://spec.matrix.org/v1.16/appendices/#signing-json
func sign(signed object, userID id.UserID, keyName string, signer jsonSigner) {
	signature := Must(signer.SignJSON(signed))
	signatures, _ := signed["signatures"].(object)
	if signatures == nil {
		signatures = object{}
		signed["signatures"] = signatures
	}
	ofUser, _ := signatures[userID.String()].(object)
	if ofUser == nil {
		ofUser = object{}
		signatures[userID.String()] = ofUser
	}
	ofUser["ed25519:"+keyName] = signature
}

// Person is an account with a cross-signing identity and devices that it has signed.
type Person struct {
	UserID  id.UserID
	Devices []*Device

	master, selfSigning, userSigning olm.PKSigning
	masterObject, selfSigningObject  json.RawMessage
	userSigningObject                json.RawMessage
}

// NewPerson makes an account with that many devices.
func NewPerson(userID id.UserID, devices int) *Person {
	p := &Person{UserID: userID}
	p.Reset()
	for i := range devices {
		p.Devices = append(p.Devices, newDevice(p, id.DeviceID(fmt.Sprintf("DEVICE%04d", i))))
	}
	return p
}

// NewPeople makes accounts with so many devices each.
func NewPeople(people, devices int) []*Person {
	made := make([]*Person, people)
	for i := range made {
		made[i] = NewPerson(id.UserID(fmt.Sprintf("@sender%d:bench", i)), devices)
	}
	return made
}

// Reset gives the account a new cross-signing identity, which signs its devices.
func (p *Person) Reset() {
	p.master, p.selfSigning, p.userSigning = Must(olm.NewPKSigning()), Must(olm.NewPKSigning()), Must(olm.NewPKSigning())
	p.masterObject = rawJSON(crossSigningKey(p.UserID, id.XSUsageMaster, p.master))
	selfSigning := crossSigningKey(p.UserID, id.XSUsageSelfSigning, p.selfSigning)
	sign(selfSigning, p.UserID, p.master.PublicKey().String(), p.master)
	userSigning := crossSigningKey(p.UserID, id.XSUsageUserSigning, p.userSigning)
	sign(userSigning, p.UserID, p.master.PublicKey().String(), p.master)
	p.selfSigningObject, p.userSigningObject = rawJSON(selfSigning), rawJSON(userSigning)
	for _, device := range p.Devices {
		device.publish()
	}
}

// MasterKey is the account's public master key.
func (p *Person) MasterKey() id.Ed25519 { return p.master.PublicKey() }

// Seeds are the private cross-signing keys.
func (p *Person) Seeds() crypto.CrossSigningSeeds {
	return crypto.CrossSigningSeeds{MasterKey: p.master.Seed(), SelfSigningKey: p.selfSigning.Seed(), UserSigningKey: p.userSigning.Seed()}
}

func crossSigningKey(userID id.UserID, usage id.CrossSigningUsage, key olm.PKSigning) object {
	public := key.PublicKey().String()
	return object{"user_id": userID.String(), "usage": []any{string(usage)}, "keys": object{"ed25519:" + public: public}}
}

// Device is a device that writes to the receiver.
type Device struct {
	Owner *Person
	ID    id.DeviceID

	account *crypto.OlmAccount
	// keys are the device keys as they are published, and embedded in what the device sends.
	keys json.RawMessage
	olm  olm.Session
}

func newDevice(owner *Person, deviceID id.DeviceID) *Device {
	d := &Device{Owner: owner, ID: deviceID, account: crypto.NewOlmAccount()}
	d.publish()
	return d
}

// publish signs the device's keys with its own and with the owner's self-signing key.
// https://spec.matrix.org/v1.16/client-server-api/#device-keys
func (d *Device) publish() {
	keys := object{
		"user_id": d.Owner.UserID.String(), "device_id": d.ID.String(),
		"algorithms": []any{string(id.AlgorithmOlmV1), string(id.AlgorithmMegolmV1)},
		"keys": object{
			"curve25519:" + d.ID.String(): d.account.IdentityKey().String(),
			"ed25519:" + d.ID.String():    d.account.SigningKey().String(),
		},
	}
	sign(keys, d.Owner.UserID, d.ID.String(), d.account)
	sign(keys, d.Owner.UserID, d.Owner.selfSigning.PublicKey().String(), d.Owner.selfSigning)
	d.keys = rawJSON(keys)
}

// Device gives the device as mautrix knows devices.
func (d *Device) Device() *id.Device {
	return &id.Device{UserID: d.Owner.UserID, DeviceID: d.ID, IdentityKey: d.account.IdentityKey(), SigningKey: d.account.SigningKey()}
}

// oneTimeKey makes a one-time key, as the answer to a claim has it.
func (d *Device) oneTimeKey() object {
	Check(d.account.Internal.GenOneTimeKeys(1))
	answer := object{}
	for keyID, key := range Must(d.account.Internal.OneTimeKeys()) {
		signed := object{"key": key.String()}
		sign(signed, d.Owner.UserID, d.ID.String(), d.account)
		answer["signed_curve25519:"+keyID] = signed
	}
	d.account.Internal.MarkKeysAsPublished()
	return answer
}
