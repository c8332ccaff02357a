package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Two throw-away machines for the self-test; neither ever reaches a network.
const (
	testReceiver = id.UserID("@receiver:selftest.invalid")
	testSender   = id.UserID("@sender:selftest.invalid")
	testDevice   = id.DeviceID("SELFTEST")
	testRoom     = id.RoomID("!room:selftest.invalid")
)

type noNetwork struct{}

var errNoNetwork = errors.New("the self-test has no network")

func (noNetwork) RoundTrip(*http.Request) (*http.Response, error) { return nil, errNoNetwork }

// selfTest sends a room key from one machine to another and checks that it is handed to us, whole, and that mautrix did not
// store it: everything that the interception assumes.
func selfTest(ctx context.Context) error {
	sender, err := testMachine(ctx, testSender)
	if err != nil {
		return err
	}
	receiver, err := testMachine(ctx, testReceiver)
	if err != nil {
		return err
	}
	session, err := olm.NewOutboundGroupSession()
	if err != nil {
		return err
	}
	outer, err := testRoomKey(sender, receiver, session)
	if err != nil {
		return err
	}
	decrypted := receiver.HandleEncryptedEvent(ctx, outer)
	switch {
	case decrypted == nil:
		return errors.New("the room key was not handed back")
	case decrypted.Type.Type != event.ToDeviceRoomKey.Type:
		return fmt.Errorf("a %s was handed back instead of the room key", decrypted.Type.Type)
	case decrypted.SenderDeviceKeys == nil:
		return errors.New("sender_device_keys was not handed back")
	case decrypted.SenderKey != sender.OwnIdentity().IdentityKey || decrypted.Keys.Ed25519 != sender.OwnIdentity().SigningKey:
		return errors.New("the sender's keys were not handed back")
	}
	if stored, err := receiver.CryptoStore.GetGroupSession(ctx, testRoom, session.ID()); err != nil {
		return err
	} else if stored != nil {
		return errors.New("mautrix stored the room key itself")
	}
	return nil
}

func testMachine(ctx context.Context, userID id.UserID) (*crypto.OlmMachine, error) {
	client, err := mautrix.NewClient("http://selftest.invalid", userID, "")
	if err != nil {
		return nil, err
	}
	client.DeviceID = testDevice
	client.Client = &http.Client{Transport: noNetwork{}}
	log := zerolog.Nop()
	rooms, ok := mautrix.NewMemoryStateStore().(crypto.StateStore)
	if !ok {
		return nil, errors.New("mautrix's memory store knows no rooms")
	}
	mach := crypto.NewOlmMachine(client, &log, crypto.NewMemoryStore(nil), rooms)
	mach.DisableDecryptKeyFetching = true
	return mach, mach.Load(ctx)
}

// testRoomKey makes the to-device event that brings the session's key, under the intercepted type class.
func testRoomKey(sender, receiver *crypto.OlmMachine, session olm.OutboundGroupSession) (*event.Event, error) {
	account := receiver.GetAccount()
	if err := account.Internal.GenOneTimeKeys(1); err != nil {
		return nil, err
	}
	oneTimeKeys, err := account.Internal.OneTimeKeys()
	if err != nil {
		return nil, err
	}
	var oneTimeKey id.Curve25519
	for _, oneTimeKey = range oneTimeKeys {
	}
	olmSession, err := sender.GetAccount().Internal.NewOutboundSession(account.IdentityKey(), oneTimeKey)
	if err != nil {
		return nil, err
	}
	deviceKeys, err := testDeviceKeys(sender)
	if err != nil {
		return nil, err
	}
	payload, err := json.Marshal(&crypto.DecryptedOlmEvent{
		Sender: testSender, SenderDeviceKeys: deviceKeys, Keys: crypto.OlmEventKeys{Ed25519: sender.GetAccount().SigningKey()},
		Recipient: testReceiver, RecipientKeys: crypto.OlmEventKeys{Ed25519: account.SigningKey()},
		Type: event.ToDeviceRoomKey,
		Content: event.Content{Parsed: &event.RoomKeyEventContent{
			Algorithm: id.AlgorithmMegolmV1, RoomID: testRoom, SessionID: session.ID(), SessionKey: session.Key(),
		}},
	})
	if err != nil {
		return nil, err
	}
	messageType, ciphertext, err := olmSession.Encrypt(payload)
	if err != nil {
		return nil, err
	}
	content := &event.EncryptedEventContent{Algorithm: id.AlgorithmOlmV1, SenderKey: sender.GetAccount().IdentityKey(), OlmCiphertext: event.OlmCiphertexts{}}
	message := content.OlmCiphertext[account.IdentityKey()]
	message.Type, message.Body = messageType, string(ciphertext)
	content.OlmCiphertext[account.IdentityKey()] = message
	return &event.Event{
		Sender: testSender, Type: event.Type{Type: event.ToDeviceEncrypted.Type, Class: interceptedClass}, Content: event.Content{Parsed: content},
	}, nil
}

func testDeviceKeys(mach *crypto.OlmMachine) (*mautrix.DeviceKeys, error) {
	own := mach.OwnIdentity()
	keys := &mautrix.DeviceKeys{
		UserID: own.UserID, DeviceID: own.DeviceID, Algorithms: []id.Algorithm{id.AlgorithmOlmV1, id.AlgorithmMegolmV1},
		Keys: mautrix.KeyMap{
			id.NewDeviceKeyID(id.KeyAlgorithmCurve25519, own.DeviceID): own.IdentityKey.String(),
			id.NewDeviceKeyID(id.KeyAlgorithmEd25519, own.DeviceID):    own.SigningKey.String(),
		},
	}
	signature, err := mach.GetAccount().SignJSON(keys)
	if err != nil {
		return nil, err
	}
	keys.Signatures = signatures.NewSingleSignature(own.UserID, id.KeyAlgorithmEd25519, own.DeviceID.String(), signature)
	return keys, nil
}
