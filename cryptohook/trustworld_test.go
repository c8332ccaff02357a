package cryptohook

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
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

// The people of these tests: each signs, encrypts and publishes with mautrix's own cryptography, and may lie.

// jsonSigner is what mautrix's Olm accounts and cross-signing keys have in common.
type jsonSigner interface{ SignJSON(any) (string, error) }

// object is a JSON object before it is written.
type object = map[string]any

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func rawJSON(value any) json.RawMessage { return must(json.Marshal(value)) }

// signInto adds a signature to an object as the specification wants it.
func signInto(signed object, userID id.UserID, keyName string, signer jsonSigner) {
	signature := must(signer.SignJSON(signed))
	putSignature(signed, userID, keyName, signature)
}

func putSignature(signed object, userID id.UserID, keyName, signature string) {
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

// forgedSignature has a signature's form, and fits nothing.
func forgedSignature() string {
	raw := make([]byte, 64)
	for i := range raw {
		raw[i] = byte(rand.Uint32())
	}
	raw[63] &= 0x0f
	return base64.RawStdEncoding.EncodeToString(raw)
}

// actor is an account with a cross-signing identity and devices.
type actor struct {
	userID      id.UserID
	master      olm.PKSigning
	selfSigning olm.PKSigning
	// userSigning is the bot's only.
	userSigning olm.PKSigning
	// verifiedBy are the bot whose user-signing key has signed the master key.
	verifiedBy *actor
	devices    []*actorDevice
	// hidden: the server has no cross-signing keys of this account.
	hidden bool
}

func newActor(userID id.UserID) *actor {
	a := &actor{userID: userID}
	a.reset()
	return a
}

// reset gives the account a new cross-signing identity.
func (a *actor) reset() {
	a.master, a.selfSigning, a.userSigning = must(olm.NewPKSigning()), must(olm.NewPKSigning()), must(olm.NewPKSigning())
	a.verifiedBy = nil
}

func (a *actor) masterKey() id.Ed25519      { return a.master.PublicKey() }
func (a *actor) selfSigningKey() id.Ed25519 { return a.selfSigning.PublicKey() }

func crossSigningObject(userID id.UserID, usage id.CrossSigningUsage, key id.Ed25519) object {
	return object{"user_id": userID.String(), "usage": []any{string(usage)}, "keys": object{"ed25519:" + key.String(): key.String()}}
}

func (a *actor) masterObject() object {
	master := crossSigningObject(a.userID, id.XSUsageMaster, a.masterKey())
	if a.verifiedBy != nil {
		signInto(master, a.verifiedBy.userID, a.verifiedBy.userSigning.PublicKey().String(), a.verifiedBy.userSigning)
	}
	return master
}

func (a *actor) selfSigningObject() object {
	selfSigning := crossSigningObject(a.userID, id.XSUsageSelfSigning, a.selfSigningKey())
	signInto(selfSigning, a.userID, a.masterKey().String(), a.master)
	return selfSigning
}

// actorDevice is a device of an actor: its Olm account, and its Olm session with the receiver.
type actorDevice struct {
	owner    *actor
	deviceID id.DeviceID
	account  *crypto.OlmAccount
	olm      olm.Session
	// crossSigned: the keys carry the owner's self-signing key's signature.
	crossSigned bool
	// unpublished: /keys/query does not show the device.
	unpublished bool
}

func (a *actor) addDevice(deviceID id.DeviceID) *actorDevice {
	d := &actorDevice{owner: a, deviceID: deviceID, account: crypto.NewOlmAccount(), crossSigned: true}
	a.devices = append(a.devices, d)
	return d
}

func (d *actorDevice) senderKey() id.SenderKey { return d.account.IdentityKey() }
func (d *actorDevice) signingKey() id.Ed25519  { return d.account.SigningKey() }

// selfSignedKeys are the device keys with the device's own signature only.
func (d *actorDevice) selfSignedKeys() object {
	keys := object{
		"user_id": d.owner.userID.String(), "device_id": d.deviceID.String(),
		"algorithms": []any{string(id.AlgorithmOlmV1), string(id.AlgorithmMegolmV1)},
		"keys": object{
			"curve25519:" + d.deviceID.String(): d.senderKey().String(),
			"ed25519:" + d.deviceID.String():    d.signingKey().String(),
		},
	}
	signInto(keys, d.owner.userID, d.deviceID.String(), d.account)
	return keys
}

// keys are the device keys as they are published and embedded.
func (d *actorDevice) keys() object {
	keys := d.selfSignedKeys()
	if d.crossSigned {
		signInto(keys, d.owner.userID, d.owner.selfSigningKey().String(), d.owner.selfSigning)
	}
	return keys
}

// forgedKeys name the owner's self-signing key as a signer, with a signature that it did not make.
func (d *actorDevice) forgedKeys() object {
	keys := d.selfSignedKeys()
	putSignature(keys, d.owner.userID, d.owner.selfSigningKey().String(), forgedSignature())
	return keys
}

// megolm is a session that somebody made for a room.
type megolm struct {
	outbound olm.OutboundGroupSession
	roomID   id.RoomID
	key      string
}

func newMegolm(roomID id.RoomID) *megolm {
	outbound := must(olm.NewOutboundGroupSession())
	return &megolm{outbound: outbound, roomID: roomID, key: outbound.Key()}
}

func (m *megolm) id() id.SessionID { return m.outbound.ID() }

func (m *megolm) roomKey() object {
	return object{"algorithm": string(id.AlgorithmMegolmV1), "room_id": m.roomID.String(), "session_id": m.id().String(), "session_key": m.key}
}

// forRoom is the room key with another room in it.
func (m *megolm) forRoom(roomID id.RoomID) object {
	content := m.roomKey()
	content["room_id"] = roomID.String()
	return content
}

// later is the room key from the next message on.
func (m *megolm) later() object {
	content := m.roomKey()
	content["session_key"] = m.outbound.Key()
	return content
}

// message encrypts a text message, and gives the content of its event.
func (m *megolm) message(text string) object {
	plaintext := rawJSON(object{
		"room_id": m.roomID.String(), "type": "m.room.message", "content": object{"msgtype": "m.text", "body": text},
	})
	return object{
		"algorithm": string(id.AlgorithmMegolmV1), "session_id": m.id().String(), "ciphertext": string(must(m.outbound.Encrypt(plaintext))),
	}
}

// keyServer is the network of the receiver: it serves what the actors publish, and takes everything else.
type keyServer struct {
	mu     sync.Mutex
	actors map[id.UserID]*actor
	// down: the server does not answer key queries.
	down bool
	// requests counts by the last part of the path.
	requests map[string]int
	// forge changes an answer to /keys/query.
	forge func(answer object)
	// other answers what the server does not know itself, with a status of 0 where it does not either.
	other func(req *http.Request) (status int, body []byte)
}

func (s *keyServer) add(a *actor) *actor {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.actors[a.userID] = a
	return a
}

func (s *keyServer) count(request string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests[request]
}

func (s *keyServer) RoundTrip(req *http.Request) (*http.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := strings.TrimPrefix(req.URL.Path, "/_matrix/client/v3/")
	s.requests[path]++
	status, answer := http.StatusOK, object{}
	switch {
	case path == "keys/query" && s.down:
		status, answer = http.StatusBadGateway, object{"errcode": "M_UNKNOWN"}
	case path == "keys/query":
		var asked mautrix.ReqQueryKeys
		if err := json.NewDecoder(req.Body).Decode(&asked); err != nil {
			return nil, err
		}
		answer = s.query(&asked)
	case path == "keys/upload":
		answer = object{"one_time_key_counts": object{"signed_curve25519": 50}}
	}
	body := []byte(rawJSON(answer))
	if s.other != nil {
		if otherStatus, otherBody := s.other(req); otherStatus != 0 {
			status, body = otherStatus, otherBody
		}
	}
	return &http.Response{
		StatusCode: status, Request: req, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(body)),
	}, nil
}

func (s *keyServer) query(asked *mautrix.ReqQueryKeys) object {
	devices, masters, selfSigning := object{}, object{}, object{}
	for userID := range asked.DeviceKeys {
		a := s.actors[userID]
		if a == nil {
			continue
		}
		ofUser := object{}
		for _, device := range a.devices {
			if !device.unpublished {
				ofUser[device.deviceID.String()] = device.keys()
			}
		}
		devices[userID.String()] = ofUser
		if !a.hidden {
			masters[userID.String()], selfSigning[userID.String()] = a.masterObject(), a.selfSigningObject()
		}
	}
	answer := object{"device_keys": devices, "master_keys": masters, "self_signing_keys": selfSigning, "failures": object{}}
	if s.forge != nil {
		s.forge(answer)
	}
	return answer
}

// manualClock stands still until it is moved.
type manualClock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *manualClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *manualClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// seenEvent is what a handler saw.
type seenEvent struct {
	eventID id.EventID
	body    string
	verdict Verdict
	evt     *event.Event
}

// trustWorld is a real Hook on a database, with a server and people around it. Nothing in it runs by itself: /syncs, the
// resolver and the inbox go on when the test says so.
type trustWorld struct {
	t       *testing.T
	ctx     context.Context
	server  *keyServer
	clock   *manualClock
	bot     *actor
	path    string
	options Options

	db     *dbutil.Database
	owner  *Ownership
	client *mautrix.Client
	hook   *Hook
	syncs  int
	events int
	// seenLock is for tests in which the inbox runs by itself.
	seenLock sync.Mutex
	seen     []seenEvent
	// onMessage, if set, is called by the handler of messages.
	onMessage func(ctx context.Context, evt *event.Event)
	log       *lockedBuffer
	// changes are what the hook has told of since they were last looked at.
	changes *changeLog
}

// changeLog collects what a hook tells of.
type changeLog struct {
	mu   sync.Mutex
	told []Change
}

func (l *changeLog) add(change Change) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told = append(l.told, change)
}

// take gives what was told of the sessions and the users since the last time.
func (l *changeLog) take() (sessions map[id.SessionID]bool, users map[id.UserID]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	sessions, users = make(map[id.SessionID]bool), make(map[id.UserID]bool)
	for _, change := range l.told {
		for _, sessionID := range change.Sessions {
			sessions[sessionID] = true
		}
		for _, userID := range change.Users {
			users[userID] = true
		}
	}
	l.told = nil
	return sessions, users
}

const trustRoom = id.RoomID("!room:test")

// lockedBuffer holds the log of a world, shown by -v when its test fails.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// newTrustWorld makes a receiver in one encrypted room. change may alter the options before the hook is installed.
func newTrustWorld(t *testing.T, change ...func(*Options)) *trustWorld {
	t.Helper()
	w := &trustWorld{
		t: t, ctx: t.Context(),
		server: &keyServer{actors: make(map[id.UserID]*actor), requests: make(map[string]int)},
		clock:  &manualClock{now: time.UnixMilli(1_700_000_000_000)},
		path:   newDatabase(t), log: &lockedBuffer{}, changes: &changeLog{},
	}
	w.bot = w.server.add(newActor("@bot:test"))
	w.options = Options{PickleKey: []byte("pickle"), Clock: w.clock.Now, OnChange: w.changes.add}
	for _, c := range change {
		c(&w.options)
	}
	w.start()
	w.sync(syncPart{state: []object{{
		"type": "m.room.encryption", "state_key": "", "event_id": "$encryption", "sender": "@alice:test",
		"content": object{"algorithm": string(id.AlgorithmMegolmV1)},
	}}})
	t.Cleanup(func() {
		w.stop()
		if t.Failed() && testing.Verbose() {
			t.Log("log of the hook:\n" + w.log.String())
		}
	})
	return w
}

func (w *trustWorld) start() {
	w.t.Helper()
	log := zerolog.New(w.log).Level(zerolog.DebugLevel)
	w.db = must(openDatabase("sqlite3-fk-wal", w.path))
	w.owner = must(Own(log.WithContext(w.ctx), w.db))
	w.client = must(mautrix.NewClient("http://server.test", w.bot.userID, "token"))
	w.client.DeviceID, w.client.Log = "BOTDEVICE", log
	w.client.Client = &http.Client{Transport: w.server}
	w.client.Syncer.(*mautrix.DefaultSyncer).ParseEventContent = true
	w.options.DB, w.options.Owner = w.db, w.owner
	w.hook = must(Install(w.ctx, w.client, w.options))
	account := w.hook.mach.GetAccount()
	if err := w.hook.mach.CryptoStore.PutAccount(w.ctx, account); err != nil {
		w.t.Fatal(err)
	}
	w.hook.mach.CrossSigningKeys = &crypto.CrossSigningKeysCache{
		MasterKey: w.bot.master, SelfSigningKey: w.bot.selfSigning, UserSigningKey: w.bot.userSigning,
	}
	if err := w.hook.prepare(w.ctx); err != nil {
		w.t.Fatal(err)
	}
	own := &actorDevice{owner: w.bot, deviceID: w.client.DeviceID, account: account, crossSigned: true}
	w.bot.devices = []*actorDevice{own}
	w.hook.syncer.OnEventType(event.EventMessage, func(ctx context.Context, evt *event.Event) {
		if w.onMessage != nil {
			w.onMessage(ctx, evt)
		}
		w.note(evt)
	})
	w.hook.syncer.OnEventType(event.EventEncrypted, func(_ context.Context, evt *event.Event) { w.note(evt) })
}

func (w *trustWorld) note(evt *event.Event) {
	verdict, ok := VerdictOf(evt)
	if !ok {
		w.t.Errorf("a handler saw %s without a verdict", evt.ID)
	}
	var body string
	if message, isMessage := evt.Content.Parsed.(*event.MessageEventContent); isMessage {
		body = message.Body
	}
	w.seenLock.Lock()
	defer w.seenLock.Unlock()
	w.seen = append(w.seen, seenEvent{evt.ID, body, verdict, evt})
}

func (w *trustWorld) stop() {
	if w.db != nil {
		w.hook.background.Wait()
		w.hook.mach.Destroy()
		if err := w.hook.owner.Release(); err != nil {
			w.t.Error(err)
		}
		_ = w.db.Close()
		w.db = nil
	}
}

// restart ends the process as a crash would, after the last commit, and begins anew on the same file.
func (w *trustWorld) restart() {
	w.t.Helper()
	w.stop()
	w.start()
}

// syncPart is what one /sync brings of one kind.
type syncPart struct {
	toDevice []object
	state    []object
	timeline []object
	changed  []id.UserID
	room     id.RoomID
	initial  bool
}

func (w *trustWorld) response(part syncPart) (*mautrix.RespSync, string) {
	w.t.Helper()
	if part.room == "" {
		part.room = trustRoom
	}
	since := fmt.Sprintf("s%d", w.syncs+1)
	if part.initial {
		since = ""
	}
	w.syncs++
	body := object{
		"next_batch": fmt.Sprintf("s%d", w.syncs+1), "device_one_time_keys_count": object{"signed_curve25519": 50},
		"to_device": object{"events": part.toDevice}, "device_lists": object{"changed": part.changed},
		"rooms": object{"join": object{part.room.String(): object{
			"state": object{"events": part.state}, "timeline": object{"events": part.timeline},
		}}},
	}
	var resp mautrix.RespSync
	if err := json.Unmarshal(rawJSON(body), &resp); err != nil {
		w.t.Fatal(err)
	}
	return &resp, since
}

// sync hands the client one /sync answer, as it comes from the network.
func (w *trustWorld) sync(part syncPart) {
	w.t.Helper()
	resp, since := w.response(part)
	if err := w.client.Syncer.ProcessResponse(w.ctx, resp, since); err != nil {
		w.t.Fatal(err)
	}
}

// resolve lets the resolver do everything that is due.
func (w *trustWorld) resolve() {
	w.t.Helper()
	for range 20 {
		worked, err := w.hook.resolver.pass(w.ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		if !worked {
			return
		}
	}
	w.t.Fatal("the resolver finds no end")
}

// handle lets the inbox handle everything that need not wait.
func (w *trustWorld) handle() {
	w.t.Helper()
	pending, err := w.hook.store.pendingInbox(w.ctx, 0, 1000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range pending {
		w.hook.inbox.handle(w.ctx, e)
	}
	if err = w.hook.uow.flush(w.ctx); err != nil {
		w.t.Fatal(err)
	}
	w.checkGrounds()
}

// pending counts the events that the inbox has yet to hand on.
func (w *trustWorld) pending() int {
	w.t.Helper()
	return len(must(w.hook.store.pendingInbox(w.ctx, 0, 1000)))
}

// olmEvent encrypts a payload for the receiver and gives the to-device event. Each change alters the payload before that.
func (w *trustWorld) olmEvent(from *actorDevice, eventType string, content object, changes ...func(payload object)) object {
	w.t.Helper()
	own := w.hook.mach.GetAccount()
	payload := object{
		"type": eventType, "content": content, "sender": from.owner.userID.String(),
		"sender_device_keys": from.keys(), "keys": object{"ed25519": from.signingKey().String()},
		"recipient": w.bot.userID.String(), "recipient_keys": object{"ed25519": own.SigningKey().String()},
	}
	for _, change := range changes {
		change(payload)
	}
	if from.olm == nil {
		from.olm = w.olmSession(from)
	}
	messageType, body, err := from.olm.Encrypt(rawJSON(payload))
	if err != nil {
		w.t.Fatal(err)
	}
	return object{
		"type": "m.room.encrypted", "sender": from.owner.userID.String(),
		"content": object{
			"algorithm": string(id.AlgorithmOlmV1), "sender_key": from.senderKey().String(),
			"ciphertext": object{own.IdentityKey().String(): object{"type": int(messageType), "body": string(body)}},
		},
	}
}

func (w *trustWorld) olmSession(from *actorDevice) olm.Session {
	w.t.Helper()
	own := w.hook.mach.GetAccount()
	if err := own.Internal.GenOneTimeKeys(1); err != nil {
		w.t.Fatal(err)
	}
	for _, oneTimeKey := range must(own.Internal.OneTimeKeys()) {
		session := must(from.account.Internal.NewOutboundSession(own.IdentityKey(), oneTimeKey))
		own.Internal.MarkKeysAsPublished()
		if err := w.hook.mach.CryptoStore.PutAccount(w.ctx, own); err != nil {
			w.t.Fatal(err)
		}
		return session
	}
	w.t.Fatal("no one-time key")
	return nil
}

// share gives the to-device event by which a device shares a session.
func (w *trustWorld) share(from *actorDevice, session *megolm, changes ...func(payload object)) object {
	w.t.Helper()
	return w.olmEvent(from, "m.room_key", session.roomKey(), changes...)
}

// withoutDeviceKeys sends what clients sent before MSC4147.
func withoutDeviceKeys(payload object) { delete(payload, "sender_device_keys") }

// embedding puts other device keys into the Olm message.
func embedding(keys object) func(object) {
	return func(payload object) { payload["sender_device_keys"] = keys }
}

// roomEvent makes a timeline event with a fresh event ID.
func (w *trustWorld) roomEvent(sender id.UserID, eventType string, content any) object {
	w.events++
	return object{
		"type": eventType, "event_id": fmt.Sprintf("$event%d", w.events), "sender": sender.String(),
		"origin_server_ts": 1_700_000_000_000 + w.events, "content": content,
	}
}

// say encrypts a message and gives its event.
func (w *trustWorld) say(from *actorDevice, session *megolm, text string) object {
	return w.roomEvent(from.owner.userID, "m.room.encrypted", session.message(text))
}

// copyOf is the same content as another event of somebody else.
func (w *trustWorld) copyOf(evt object, sender id.UserID) object {
	return w.roomEvent(sender, "m.room.encrypted", maps.Clone(evt["content"].(object)))
}

// judgeNow delivers an event and gives what its handler saw.
func (w *trustWorld) judgeNow(evt object) seenEvent {
	w.t.Helper()
	w.sync(syncPart{timeline: []object{evt}})
	w.handle()
	return w.sawOne(id.EventID(evt["event_id"].(string)))
}

func (w *trustWorld) sawOne(eventID id.EventID) seenEvent {
	w.t.Helper()
	var found []seenEvent
	for _, seen := range w.seen {
		if seen.eventID == eventID {
			found = append(found, seen)
		}
	}
	if len(found) != 1 {
		w.t.Fatalf("handlers saw %s %d times instead of once", eventID, len(found))
	}
	return found[0]
}

func (w *trustWorld) saw(eventID any) bool {
	w.seenLock.Lock()
	defer w.seenLock.Unlock()
	for _, seen := range w.seen {
		if string(seen.eventID) == eventID.(string) {
			return true
		}
	}
	return false
}

// row is one device's claim on a session; the test fails if there is none.
func (w *trustWorld) row(session *megolm, device *actorDevice) *SenderData {
	w.t.Helper()
	claim := must(w.hook.store.claim(w.ctx, session.id(), device.senderKey()))
	if claim == nil {
		w.t.Fatalf("%s has no claim on the session", device.deviceID)
	}
	return claim
}

func (w *trustWorld) claims(session *megolm) []*SenderData {
	w.t.Helper()
	return must(w.hook.store.claims(w.ctx, session.id()))
}

// storedKey is the session's key in mautrix's table, nil when there is none for the room.
func (w *trustWorld) storedKey(session *megolm, roomID id.RoomID) *crypto.InboundGroupSession {
	w.t.Helper()
	stored, err := w.hook.uow.SQLCryptoStore.GetGroupSession(w.ctx, roomID, session.id())
	if err != nil && !errors.Is(err, crypto.ErrGroupSessionWithheld) {
		w.t.Fatal(err)
	}
	return stored
}

// know lets the receiver know an account as the server publishes it now.
func (w *trustWorld) know(actors ...*actor) {
	w.t.Helper()
	for _, a := range actors {
		w.server.add(a)
		if _, err := w.hook.fetchKeys(w.ctx, []id.UserID{a.userID}); err != nil {
			w.t.Fatal(err)
		}
	}
	w.resolve()
}

func (w *trustWorld) wantState(session *megolm, device *actorDevice, want State) {
	w.t.Helper()
	if got := w.row(session, device).State; got != want {
		w.t.Errorf("state %s, want %s", got, want)
	}
}

func wantCode(t *testing.T, seen seenEvent, want Code) {
	t.Helper()
	if seen.verdict.Code != want {
		t.Errorf("%s: code %s (%s), want %s", seen.eventID, seen.verdict.Code, seen.verdict.Reason, want)
	}
}
