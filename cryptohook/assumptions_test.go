package cryptohook

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// What the hook assumes of mautrix, one test each. When an upgrade of mautrix breaks one, its message says what to do.

// stockMachine is mautrix as it is: a machine on a SQLite store, without a hook. Its network counts and fails.
func stockMachine(t *testing.T, userID id.UserID) (*crypto.OlmMachine, *crypto.SQLCryptoStore, *failingNetwork) {
	t.Helper()
	db := must(dbutil.NewWithDialect("file:"+filepath.Join(t.TempDir(), "stock.db")+"?_txlock=immediate", "sqlite3-fk-wal"))
	t.Cleanup(func() { _ = db.Close() })
	store := crypto.NewSQLCryptoStore(db, dbutil.NoopLogger, userID.String(), testDevice, []byte("pickle"))
	if err := store.DB.Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	network := &failingNetwork{}
	client := must(mautrix.NewClient("http://stock.test", userID, "token"))
	client.DeviceID, client.Client = testDevice, &http.Client{Transport: network}
	log := zerolog.Nop()
	mach := crypto.NewOlmMachine(client, &log, store, &mautrixState{})
	if err := mach.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := store.PutAccount(t.Context(), mach.GetAccount()); err != nil {
		t.Fatal(err)
	}
	return mach, store, network
}

type failingNetwork struct{ requests int }

func (n *failingNetwork) RoundTrip(*http.Request) (*http.Response, error) {
	n.requests++
	return nil, errNoNetwork
}

// mautrixState is a state store without any room.
type mautrixState struct{}

func (*mautrixState) IsEncrypted(context.Context, id.RoomID) (bool, error) { return true, nil }
func (*mautrixState) GetEncryptionEvent(context.Context, id.RoomID) (*event.EncryptionEventContent, error) {
	return nil, nil
}
func (*mautrixState) GetHistoryVisibility(context.Context, id.RoomID) (*event.HistoryVisibilityEventContent, error) {
	return nil, nil
}
func (*mautrixState) FindSharedRooms(context.Context, id.UserID) ([]id.RoomID, error) {
	return nil, nil
}

// olmTo encrypts a payload of the device for a stock machine.
func olmTo(t *testing.T, mach *crypto.OlmMachine, from *actorDevice, eventType string, content object, class event.TypeClass, changes ...func(object)) *event.Event {
	t.Helper()
	account := mach.GetAccount()
	payload := object{
		"type": eventType, "content": content, "sender": from.owner.userID.String(),
		"sender_device_keys": from.keys(), "keys": object{"ed25519": from.signingKey().String()},
		"recipient": mach.Client.UserID.String(), "recipient_keys": object{"ed25519": account.SigningKey().String()},
	}
	for _, change := range changes {
		change(payload)
	}
	if from.olm == nil {
		if err := account.Internal.GenOneTimeKeys(1); err != nil {
			t.Fatal(err)
		}
		for _, oneTimeKey := range must(account.Internal.OneTimeKeys()) {
			from.olm = must(from.account.Internal.NewOutboundSession(account.IdentityKey(), oneTimeKey))
		}
		account.Internal.MarkKeysAsPublished()
	}
	messageType, body, err := from.olm.Encrypt(rawJSON(payload))
	if err != nil {
		t.Fatal(err)
	}
	raw := rawJSON(object{
		"type": "m.room.encrypted", "sender": from.owner.userID.String(),
		"content": object{
			"algorithm": string(id.AlgorithmOlmV1), "sender_key": from.senderKey().String(),
			"ciphertext": object{account.IdentityKey().String(): object{"type": int(messageType), "body": string(body)}},
		},
	})
	var evt event.Event
	if err = evt.UnmarshalJSON(raw); err != nil {
		t.Fatal(err)
	}
	evt.Type.Class = event.ToDeviceEventType
	if err = evt.Content.ParseRaw(evt.Type); err != nil {
		t.Fatal(err)
	}
	evt.Type.Class = class
	return &evt
}

func aliceDevice() *actorDevice { return newActor("@alice:test").addDevice("ALICE") }

func TestAssumptionRoomKeysAreHandedBackUnderThePrivateClass(t *testing.T) {
	mach, store, _ := stockMachine(t, "@bot:test")
	alice, s := aliceDevice(), newMegolm(trustRoom)
	got := mach.HandleEncryptedEvent(t.Context(), olmTo(t, mach, alice, "m.room_key", s.roomKey(), interceptedClass))
	const advice = "room keys are not handed back under a private event class any more: the interception (DESIGN.md, section 5) has to be found anew; do not upgrade"
	switch {
	case got == nil:
		t.Fatal(advice)
	case got.Type.Type != "m.room_key" || got.Type.Class != interceptedClass || len(got.Content.VeryRaw) == 0:
		t.Errorf("handed back %+v: %s", got, advice)
	case got.SenderDeviceKeys == nil || got.Keys.Ed25519 != alice.signingKey() || got.SenderKey != alice.senderKey() || got.Sender != "@alice:test":
		t.Errorf("handed back %+v: the sender's keys are missing, on which steps A and D rest", got)
	}
	if stored, err := store.GetGroupSession(t.Context(), trustRoom, s.id()); stored != nil || err != nil {
		t.Error("mautrix stores the intercepted room key itself: it would be stored without its sender data; let receiveRoomKey only derive")
	}
}

func TestAssumptionEveryTypeOfRoomKeyIsOursOrHarmless(t *testing.T) {
	// What mautrix handles itself under the private class must neither store sessions nor send.
	for eventType := range event.TypeMap {
		if eventType.Class == interceptedClass && eventType.Type != event.ToDeviceDummy.Type && eventType.Type != event.ToDeviceSecretSend.Type {
			t.Errorf("%s is registered under the private class: mautrix would handle it inside the gate", eventType.Type)
		}
	}
	mach, store, network := stockMachine(t, "@bot:test")
	mach.DisableDecryptKeyFetching = true
	alice, s := aliceDevice(), newMegolm(trustRoom)
	for _, eventType := range []string{
		"m.room_key", "m.forwarded_room_key", "m.room_key_request", "m.room_key_bundle", "io.element.msc4268.room_key_bundle", "m.room_key.withheld",
		"m.secret.request", "m.key.verification.request", "org.example.unknown",
	} {
		content := s.roomKey()
		content["action"], content["request_id"], content["requesting_device_id"] = "request", "1", "ALICE"
		got := mach.HandleEncryptedEvent(t.Context(), olmTo(t, mach, alice, eventType, content, interceptedClass))
		if got == nil || got.Type.Type != eventType {
			t.Errorf("%s is handled by mautrix under the private class: see what its handler does inside the gate", eventType)
		}
	}
	if stored, _ := store.GetGroupSession(t.Context(), trustRoom, s.id()); stored != nil || network.requests != 0 {
		t.Error("mautrix stores or sends on an intercepted event: keep such types away from HandleEncryptedEvent while the gate is held")
	}
}

func TestAssumptionOtherMachinesStillHandleRoomKeys(t *testing.T) {
	newTrustWorld(t) // a hook is installed in this process
	mach, store, _ := stockMachine(t, "@stock:test")
	alice, s := aliceDevice(), newMegolm(trustRoom)
	mach.HandleToDeviceEvent(t.Context(), olmTo(t, mach, alice, "m.room_key", s.roomKey(), event.ToDeviceEventType))
	if stored, err := store.GetGroupSession(t.Context(), trustRoom, s.id()); stored == nil || err != nil {
		t.Error("a machine without the hook does not handle room keys any more: the interception is no longer additive; register nothing in event.TypeMap but under the private class")
	}
}

func TestAssumptionOlmPayloadIsChecked(t *testing.T) {
	for name, forge := range map[string]func(object){
		"the sender":             func(p object) { p["sender"] = "@eve:test"; delete(p, "sender_device_keys") },
		"the recipient":          func(p object) { p["recipient"] = "@eve:test" },
		"the recipient's keys":   func(p object) { p["recipient_keys"] = object{"ed25519": "x"} },
		"the sender's ed25519":   func(p object) { p["keys"] = object{"ed25519": "x"} },
		"the user of the keys":   func(p object) { p["sender_device_keys"].(object)["user_id"] = "@eve:test" },
		"the signature":          func(p object) { delete(p["sender_device_keys"].(object), "signatures") },
		"the curve25519 key":     func(p object) { p["sender_device_keys"].(object)["keys"].(object)["curve25519:ALICE"] = "x" },
		"the ed25519 key":        func(p object) { p["sender_device_keys"].(object)["keys"].(object)["ed25519:ALICE"] = "x" },
		"the device of the keys": func(p object) { p["sender_device_keys"].(object)["device_id"] = "OTHER" },
	} {
		mach, _, _ := stockMachine(t, "@bot:test")
		got := mach.HandleEncryptedEvent(t.Context(), olmTo(t, mach, aliceDevice(), "m.room_key", newMegolm(trustRoom).roomKey(), interceptedClass, forge))
		if got != nil {
			t.Errorf("mautrix does not check %s of intercepted events any more: let receiveEncrypted check it", name)
		}
	}
}

// The owner check on receiving: a known device with the same curve25519 key and another ed25519 key.
func TestAssumptionKnownDevicesKeysAreCompared(t *testing.T) {
	mach, store, _ := stockMachine(t, "@bot:test")
	mach.DisableDecryptKeyFetching = true
	alice := aliceDevice()
	known := &id.Device{UserID: "@alice:test", DeviceID: "ALICE", IdentityKey: alice.senderKey(), SigningKey: "another"}
	if err := store.PutDevices(t.Context(), "@alice:test", map[id.DeviceID]*id.Device{"ALICE": known}); err != nil {
		t.Fatal(err)
	}
	if got := mach.HandleEncryptedEvent(t.Context(), olmTo(t, mach, alice, "m.room_key", newMegolm(trustRoom).roomKey(), interceptedClass, withoutDeviceKeys)); got != nil {
		t.Error("mautrix accepts an Olm message whose ed25519 key is not the known device's: stepD's owner check is the only one left; REFERENCE.md wants the room key rejected")
	}
}

func TestAssumptionDeletedDevicesStillResolve(t *testing.T) {
	_, store, _ := stockMachine(t, "@bot:test")
	device := &id.Device{UserID: "@alice:test", DeviceID: "ALICE", IdentityKey: "curve", SigningKey: "ed"}
	for _, devices := range []map[id.DeviceID]*id.Device{{"ALICE": device}, {}} {
		if err := store.PutDevices(t.Context(), "@alice:test", devices); err != nil {
			t.Fatal(err)
		}
	}
	found, err := store.FindDeviceByKey(t.Context(), "@alice:test", "curve")
	if err != nil || found == nil || !found.Deleted {
		t.Errorf("FindDeviceByKey gives %+v (%v): mautrix does not find deleted devices any more; our own device table may be given up if all else holds", found, err)
	}
}

func TestAssumptionGetNextBatchIsEmptyAtFirst(t *testing.T) {
	_, store, _ := stockMachine(t, "@bot:test")
	if err := store.PutNextBatch(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	again := crypto.NewSQLCryptoStore(store.DB, dbutil.NoopLogger, "@bot:test", testDevice, []byte("pickle"))
	if token, err := again.GetNextBatch(t.Context()); token != "" || err != nil {
		t.Errorf("GetNextBatch gives %q at the first call (%v): it may be used instead of getTokenQuery now", token, err)
	}
}

// recordingSyncer notes what the client calls, in order.
type recordingSyncer struct{ calls []string }

var errEnough = errors.New("one /sync is enough")

func (r *recordingSyncer) ProcessResponse(context.Context, *mautrix.RespSync, string) error {
	r.calls = append(r.calls, "process")
	return errEnough
}
func (r *recordingSyncer) OnFailedSync(*mautrix.RespSync, error) (time.Duration, error) {
	return 0, errEnough
}
func (r *recordingSyncer) GetFilterJSON(id.UserID) *mautrix.Filter { return &mautrix.Filter{} }
func (r *recordingSyncer) SaveFilterID(context.Context, id.UserID, string) error {
	return nil
}
func (r *recordingSyncer) LoadFilterID(context.Context, id.UserID) (string, error) { return "f", nil }
func (r *recordingSyncer) LoadNextBatch(context.Context, id.UserID) (string, error) {
	return "s1", nil
}
func (r *recordingSyncer) SaveNextBatch(_ context.Context, _ id.UserID, token string) error {
	r.calls = append(r.calls, "save "+token)
	return nil
}

type answer string

func (a answer) RoundTrip(req *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Request: req, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(string(a)))}, nil
}

func TestAssumptionTokenIsSavedBeforeProcessing(t *testing.T) {
	client := must(mautrix.NewClient("http://stock.test", "@bot:test", "token"))
	client.Client = &http.Client{Transport: answer(`{"next_batch":"s2"}`)}
	syncer := &recordingSyncer{}
	client.Syncer, client.Store = syncer, syncer
	if err := client.SyncWithContext(t.Context()); !errors.Is(err, errEnough) {
		t.Fatal(err)
	}
	if got := fmt.Sprint(syncer.calls); got != "[save s2 process]" {
		t.Errorf("the client calls %s: if the token is saved after processing now, tokenStore.SaveNextBatch may save it, and must if nothing else does", got)
	}
}

func TestAssumptionFirstSeenKeyIsKept(t *testing.T) {
	_, store, _ := stockMachine(t, "@bot:test")
	for _, key := range []id.Ed25519{"first", "second"} {
		if err := store.PutCrossSigningKey(t.Context(), "@alice:test", id.XSUsageMaster, key); err != nil {
			t.Fatal(err)
		}
	}
	keys := must(store.GetCrossSigningKeys(t.Context(), "@alice:test"))
	if got := keys[id.XSUsageMaster]; got.First != "first" || got.Key != "second" {
		t.Errorf("stored %+v: mautrix forgets the first key that it saw; our own first_master_key must not be filled from it", got)
	}
}

func TestAssumptionKeyFetchingCanBeKeptOutOfDecryption(t *testing.T) {
	for _, disabled := range []bool{true, false} {
		mach, _, network := stockMachine(t, "@bot:test")
		mach.DisableDecryptKeyFetching = disabled
		alice, s := aliceDevice(), newMegolm(trustRoom)
		if mach.HandleEncryptedEvent(t.Context(), olmTo(t, mach, alice, "m.room_key", s.roomKey(), event.ToDeviceEventType, withoutDeviceKeys)) != nil {
			t.Fatal("not handled")
		}
		afterOlm := network.requests
		evt := &event.Event{ID: "$e", Sender: "@alice:test", RoomID: trustRoom, Type: event.EventEncrypted, Timestamp: 1}
		if err := evt.Content.UnmarshalJSON(rawJSON(s.message("hello"))); err != nil {
			t.Fatal(err)
		}
		if err := evt.Content.ParseRaw(evt.Type); err != nil {
			t.Fatal(err)
		}
		if _, err := mach.DecryptMegolmEvent(t.Context(), evt); err != nil {
			t.Fatal(err)
		}
		if disabled && network.requests != 0 {
			t.Errorf("%d requests while receiving, %d in all: DisableDecryptKeyFetching does not keep HTTP out any more; the transport refuses it while the gate is held", afterOlm, network.requests)
		}
		if !disabled && network.requests == 0 {
			t.Error("without the switch there is no request either: the switch may be left out now")
		}
	}
}

// Why device.Trust is not believed: once set by SAS it says "verified" whatever becomes of the identity.
func TestAssumptionDeviceTrustMasksALaterIdentity(t *testing.T) {
	mach, store, _ := stockMachine(t, "@bot:test")
	device := &id.Device{UserID: "@alice:test", DeviceID: "ALICE", IdentityKey: "curve", SigningKey: "ed", Trust: id.TrustStateVerified}
	for _, key := range []id.Ed25519{"first", "second"} {
		if err := store.PutCrossSigningKey(t.Context(), "@alice:test", id.XSUsageMaster, key); err != nil {
			t.Fatal(err)
		}
	}
	if trust := must(mach.ResolveTrustContext(t.Context(), device)); trust != id.TrustStateVerified {
		t.Errorf("trust is %s: a device verified by SAS no longer masks a change of the master key; mautrix's own judgement may be used for it", trust)
	}
}

// Why claims are kept beside mautrix's table: it has one row a session ID, in whatever room and of whatever sender.
func TestAssumptionSessionsAreKeyedByTheirIDAlone(t *testing.T) {
	_, store, _ := stockMachine(t, "@bot:test")
	s := newMegolm(trustRoom)
	for _, holder := range []struct {
		senderKey id.SenderKey
		roomID    id.RoomID
	}{{"alice", trustRoom}, {"mallory", "!other:test"}} {
		session := must(crypto.NewInboundGroupSession(holder.senderKey, "ed", holder.roomID, s.key, 0, 0, nil, false))
		if err := store.PutGroupSession(t.Context(), session); err != nil {
			t.Fatal(err)
		}
	}
	if stored, err := store.GetGroupSession(t.Context(), trustRoom, s.id()); stored != nil || err != nil {
		t.Error("mautrix keeps one session for each room now: holderOf has to look the room up too")
	}
	if err := store.RedactGroupSession(t.Context(), trustRoom, s.id(), "test"); err != nil {
		t.Fatal(err)
	}
	if stored, _ := store.GetGroupSession(t.Context(), "!other:test", s.id()); stored != nil {
		t.Error("RedactGroupSession heeds the room now: reject need not look for the holder first")
	}
}

// Why the hook has to look for an existing session itself: mautrix takes the better ratchet of any sender.
func TestAssumptionStoringTakesABetterRatchetOfAnySender(t *testing.T) {
	mach, store, _ := stockMachine(t, "@bot:test")
	s := newMegolm(trustRoom)
	s.message("used up")
	for _, share := range []struct {
		senderKey id.SenderKey
		key       string
	}{{"alice", s.outbound.Key()}, {"mallory", s.key}} {
		session := must(crypto.NewInboundGroupSession(share.senderKey, "ed", trustRoom, share.key, 0, 0, nil, false))
		if err := mach.StoreGroupSession(t.Context(), session); err != nil {
			t.Fatal(err)
		}
	}
	stored := must(store.GetGroupSession(t.Context(), trustRoom, s.id()))
	if stored.SenderKey != "mallory" {
		t.Error("mautrix compares sender keys before it takes a better ratchet now: the hook's own look for another holder may be simplified")
	}
}

// Why a second claimant's better ratchet may be taken: a session key is signed by the session itself.
func TestAssumptionSessionKeysAreSigned(t *testing.T) {
	s := newMegolm(trustRoom)
	raw := must(base64.RawStdEncoding.DecodeString(s.key))
	for _, place := range []int{1, 5, 100, len(raw) - 1} {
		broken := bytes.Clone(raw)
		broken[place] ^= 1
		if _, err := olm.NewInboundGroupSession([]byte(base64.RawStdEncoding.EncodeToString(broken))); err == nil {
			t.Errorf("a session key that was altered at byte %d is accepted: receiveRoomKey must not merge the ratchet of a second claimant any more", place)
		}
	}
}

// The gate closes at GetOlmHash, with the Olm lock held, before anything is written.
type orderStore struct {
	*crypto.SQLCryptoStore
	calls []string
}

func (s *orderStore) GetOlmHash(ctx context.Context, hash [32]byte) (time.Time, error) {
	s.calls = append(s.calls, "GetOlmHash")
	return s.SQLCryptoStore.GetOlmHash(ctx, hash)
}
func (s *orderStore) GetSessions(ctx context.Context, key id.SenderKey) (crypto.OlmSessionList, error) {
	s.calls = append(s.calls, "GetSessions")
	return s.SQLCryptoStore.GetSessions(ctx, key)
}
func (s *orderStore) PutOlmHash(ctx context.Context, hash [32]byte, at time.Time) error {
	s.calls = append(s.calls, "PutOlmHash")
	return s.SQLCryptoStore.PutOlmHash(ctx, hash, at)
}
func (s *orderStore) AddSession(ctx context.Context, key id.SenderKey, session *crypto.OlmSession) error {
	s.calls = append(s.calls, "AddSession")
	return s.SQLCryptoStore.AddSession(ctx, key, session)
}
func (s *orderStore) UpdateSession(ctx context.Context, key id.SenderKey, session *crypto.OlmSession) error {
	s.calls = append(s.calls, "UpdateSession")
	return s.SQLCryptoStore.UpdateSession(ctx, key, session)
}
func (s *orderStore) PutAccount(ctx context.Context, account *crypto.OlmAccount) error {
	s.calls = append(s.calls, "PutAccount")
	return s.SQLCryptoStore.PutAccount(ctx, account)
}

func TestAssumptionTheMessageHashIsLookedUpFirst(t *testing.T) {
	mach, store, _ := stockMachine(t, "@bot:test")
	order := &orderStore{SQLCryptoStore: store}
	mach.CryptoStore = order
	alice := aliceDevice()
	for i, want := range []string{"GetOlmHash GetSessions PutOlmHash AddSession PutAccount", "GetOlmHash GetSessions PutOlmHash UpdateSession"} {
		order.calls = nil
		mach.HandleEncryptedEvent(t.Context(), olmTo(t, mach, alice, "m.room_key", newMegolm(trustRoom).roomKey(), interceptedClass))
		if got := strings.Join(order.calls, " "); got != want && !sameButForTheOrderOf(got, want) {
			t.Errorf("message %d: mautrix calls %s, not %s: the gate of the unit of work has to close at the first call that is under the Olm lock", i+1, got, want)
		}
	}
}

// sameButForTheOrderOf allows the writes to come in any order, after the hash was looked up.
func sameButForTheOrderOf(got, want string) bool {
	a, b := strings.Fields(got), strings.Fields(want)
	if len(a) != len(b) || len(a) == 0 || a[0] != "GetOlmHash" {
		return false
	}
	for _, call := range b {
		if !strings.Contains(got, call) {
			return false
		}
	}
	return true
}

// The reader of a redacted session gets an error that says so, and a session that was never there none at all.
func TestAssumptionRedactedSessionsSaySo(t *testing.T) {
	_, store, _ := stockMachine(t, "@bot:test")
	s := newMegolm(trustRoom)
	if err := store.PutGroupSession(t.Context(), must(crypto.NewInboundGroupSession("alice", "ed", trustRoom, s.key, 0, 0, nil, false))); err != nil {
		t.Fatal(err)
	}
	if err := store.RedactGroupSession(t.Context(), trustRoom, s.id(), "test"); err != nil {
		t.Fatal(err)
	}
	if stored, err := store.GetGroupSession(t.Context(), trustRoom, s.id()); stored != nil || !errors.Is(err, crypto.ErrGroupSessionWithheld) {
		t.Errorf("a redacted session is %v, %v: classify and storedKey tell by the error that the key was deleted", stored, err)
	}
	if stored, err := store.GetGroupSession(t.Context(), trustRoom, "none"); stored != nil || err != nil {
		t.Errorf("a session that was never there is %v, %v", stored, err)
	}
}

// Why the unit of work writes the account with a statement of its own.
func TestAssumptionPutAccountWritesTheTokenToo(t *testing.T) {
	mach, store, _ := stockMachine(t, "@bot:test")
	if err := store.PutNextBatch(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	again := crypto.NewSQLCryptoStore(store.DB, dbutil.NoopLogger, "@bot:test", testDevice, []byte("pickle"))
	if err := again.PutAccount(t.Context(), mach.GetAccount()); err != nil {
		t.Fatal(err)
	}
	var token string
	if err := store.DB.QueryRow(t.Context(), getTokenQuery, "@bot:test").Scan(&token); err != nil || token == "s1" {
		t.Errorf("PutAccount leaves the token %q alone (%v): upsertAccountQuery may be given up for mautrix's own", token, err)
	}
}

// Why ratchet tracking is off: what it stores is never read, so that every event writes the session.
func TestAssumptionRatchetSafetyIsNeverLoaded(t *testing.T) {
	_, store, _ := stockMachine(t, "@bot:test")
	s := newMegolm(trustRoom)
	session := must(crypto.NewInboundGroupSession("alice", "ed", trustRoom, s.key, 0, 0, nil, false))
	session.RatchetSafety.NextIndex = 7
	if err := store.PutGroupSession(t.Context(), session); err != nil {
		t.Fatal(err)
	}
	if stored := must(store.GetGroupSession(t.Context(), trustRoom, s.id())); stored.RatchetSafety.NextIndex != 0 {
		t.Error("mautrix reads what it stores of a ratchet now: DisableRatchetTracking may be given up, if its writes are staged like all others")
	}
}

// Signing is done over everything but "signatures" and "unsigned", and a doubled field does not hide behind another.
func TestAssumptionSignaturesCoverUnknownFields(t *testing.T) {
	signer := must(olm.NewPKSigning())
	signed := object{"user_id": "@alice:test", "new field": object{"b": 1.0, "a": "<&>"}}
	signInto(signed, "@alice:test", signer.PublicKey().String(), signer)
	if !signedBy(rawJSON(signed), "@alice:test", signer.PublicKey()) {
		t.Error("mautrix signs and verifies differently: every derivation would reject honest sessions (step H)")
	}
	signed["new field"] = 1
	if signedBy(rawJSON(signed), "@alice:test", signer.PublicKey()) {
		t.Error("mautrix does not verify unknown fields: what a signature covers has to be checked by ourselves")
	}
}

// The state that the self-test proves at each start, in the words of this version.
func TestAssumptionSelfTestPasses(t *testing.T) {
	if err := selfTest(t.Context()); err != nil {
		t.Errorf("%v: Install refuses to start with this version of mautrix", err)
	}
}
