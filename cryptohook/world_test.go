package cryptohook

import (
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/mattn/go-sqlite3"
	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	goolm "maunium.net/go/mautrix/crypto/goolm/account"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// The world of the unit of work: a receiver that can be closed, killed and opened again, peers that send it what it is fed with
// and read what it sends, and the network between them. What it is fed with is made beforehand, so that another process can be
// fed with the same.

// network takes what the receiver sends, after the barrier. It is all that is left of the world in a child process.
type network struct {
	// people answer /keys/query; nil in a child process, where everything is known already.
	people *keyServer
	// oneTimeKeys are the keys of the peers, in the order in which they are handed out. Another process begins anew with them: a
	// session that was made of one and used is durable, so nobody asks again.
	oneTimeKeys map[id.UserID][]object
	claimed     map[id.UserID]int

	// left is how many one-time keys of the receiver the server says it has left.
	left int

	mu       sync.Mutex
	uploaded []id.Curve25519
	requests map[string]int
	// onSent is called with the body of each /sendToDevice.
	onSent func(body []byte)
	// onMessages answers a request for a room's history.
	onMessages func() object
}

func (n *network) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		body = must(io.ReadAll(req.Body))
	}
	path := strings.TrimPrefix(req.URL.Path, "/_matrix/client/v3/")
	if path == "keys/query" && n.people != nil {
		req.Body = io.NopCloser(bytes.NewReader(body))
		return n.people.RoundTrip(req)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	kind, _, _ := strings.Cut(path, "/m.")
	if strings.HasSuffix(path, "/messages") {
		kind = "messages"
	}
	n.requests[kind]++
	answer := object{}
	switch kind {
	case "messages":
		answer = n.onMessages()
		if err := req.Context().Err(); err != nil {
			return nil, err
		}
	case "keys/upload":
		var upload mautrix.ReqUploadKeys
		if err := json.Unmarshal(body, &upload); err != nil {
			return nil, err
		}
		for _, key := range upload.OneTimeKeys {
			n.uploaded = append(n.uploaded, key.Key)
		}
		answer["one_time_key_counts"] = object{"signed_curve25519": n.left}
	case "keys/claim":
		answer["one_time_keys"] = n.claim(body)
	case "sendToDevice":
		if n.onSent != nil {
			n.onSent(body)
		}
	}
	return &http.Response{
		StatusCode: http.StatusOK, Request: req, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(rawJSON(answer))),
	}, nil
}

func (n *network) claim(body []byte) object {
	var claim mautrix.ReqClaimKeys
	if err := json.Unmarshal(body, &claim); err != nil {
		panic(err)
	}
	claimed := object{}
	for userID := range claim.OneTimeKeys {
		claimed[userID.String()] = n.oneTimeKeys[userID][n.claimed[userID]]
		n.claimed[userID]++
	}
	return claimed
}

func (n *network) count(kind string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.requests[kind]
}

const (
	receiverUser   = id.UserID("@receiver:test")
	receiverDevice = id.DeviceID("RECEIVER")
	storyRoom      = id.RoomID("!story:test")
	safeDriver     = "sqlite3-fk-wal-fullsync"
)

// receiver is a Hook on a database.
type receiver struct {
	*Hook
	network *network
	db      *dbutil.Database
}

// openReceiver opens a database that newDatabase has named. bot is the receiver's own cross-signing identity.
func openReceiver(ctx context.Context, driver, path string, connections int, net *network, bot *actor, log zerolog.Logger) (*receiver, error) {
	db, err := openDatabase(driver, path)
	if err != nil {
		return nil, err
	}
	db.RawDB.SetMaxOpenConns(connections)
	client, err := mautrix.NewClient("http://server.test", receiverUser, "token")
	if err != nil {
		return nil, err
	}
	client.DeviceID, client.Log = receiverDevice, log
	client.Client = &http.Client{Transport: net}
	hook, err := Install(ctx, client, Options{DB: db, PickleKey: []byte("pickle")})
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	hook.mach.CrossSigningKeys = &crypto.CrossSigningKeysCache{MasterKey: bot.master, SelfSigningKey: bot.selfSigning, UserSigningKey: bot.userSigning}
	must(hook.mach.GetOwnCrossSigningPublicKeys(ctx)) // as whoever imports them does
	return &receiver{Hook: hook, network: net, db: db}, nil
}

func (r *receiver) close() {
	r.background.Wait()
	r.mach.Destroy()
	_ = r.owner.Release()
	_ = r.db.Close()
}

func (r *receiver) token(ctx context.Context) string {
	return must(r.client.Store.LoadNextBatch(ctx, receiverUser))
}

// process hands the receiver a /sync answer, as mautrix's sync loop does.
func (r *receiver) process(ctx context.Context, sync json.RawMessage) error {
	var resp mautrix.RespSync
	if err := json.Unmarshal(sync, &resp); err != nil {
		return err
	}
	return r.syncer.ProcessResponse(ctx, &resp, r.token(ctx))
}

// send encrypts a message for a peer's device and sends it.
func (r *receiver) send(ctx context.Context, to *id.Device, text string) error {
	return r.mach.SendEncryptedToDevice(ctx, to, event.Type{Type: "test.ping", Class: event.ToDeviceEventType}, event.Content{Raw: object{"text": text}})
}

// count gives the first column of a query's only row.
func (r *receiver) count(query string, args ...any) (n int) {
	if err := r.db.RawDB.QueryRow(query, args...).Scan(&n); err != nil {
		panic(err)
	}
	return n
}

// peer is a device that writes to the receiver and reads what it writes.
type peer struct {
	*actorDevice
	// started are the IDs of the Olm sessions that the peer has started.
	started []olm.Session
	mach    *crypto.OlmMachine
}

func (p *peer) device() *id.Device {
	return &id.Device{UserID: p.owner.userID, DeviceID: p.deviceID, IdentityKey: p.senderKey(), SigningKey: p.signingKey()}
}

// wantedKey is a room key that the receiver has to have in the end.
type wantedKey struct {
	RoomID    id.RoomID
	SessionID id.SessionID
	SenderKey id.SenderKey
	Export    string
	State     State
}

// wantedEvent is a room event that the receiver's handlers have to see.
type wantedEvent struct {
	EventID id.EventID
	Sender  id.UserID
	Body    string
	Code    Code
}

// story is what the receiver is fed with, and what it has to make of it. It is written to a file for child processes.
type story struct {
	Seeds       [3][]byte
	Syncs       []json.RawMessage
	Devices     []*id.Device
	OneTimeKeys map[id.UserID][]object

	// encryptors are how many write to the peers at once: each may start an Olm session with each of them.
	encryptors int

	keys     []wantedKey
	events   []wantedEvent
	messages int
	seed     string
	bot      *actor
	peers    []*peer
	receiver *crypto.OlmAccount
	written  int
	free     []id.Curve25519
}

// newStory makes the peers and a database at seed that knows them, and has seen the first /sync.
func newStory(t *testing.T, seed string, peers int) *story {
	t.Helper()
	ctx := t.Context()
	s := &story{seed: seed, bot: newActor(receiverUser), OneTimeKeys: make(map[id.UserID][]object), encryptors: 1}
	s.Seeds = [3][]byte{s.bot.master.Seed(), s.bot.selfSigning.Seed(), s.bot.userSigning.Seed()}
	net := s.network()
	net.people = &keyServer{actors: make(map[id.UserID]*actor), requests: make(map[string]int)}
	r := s.openWith(t, safeDriver, seed, 1, net)
	defer r.close()
	if err := r.mach.ShareKeys(ctx, 0); err != nil {
		t.Fatal(err)
	}
	s.receiver, s.free = r.mach.GetAccount(), net.uploaded
	net.people.add(s.bot)
	own := &actorDevice{owner: s.bot, deviceID: receiverDevice, account: s.receiver, crossSigned: true}
	s.bot.devices = []*actorDevice{own}
	users := []id.UserID{receiverUser}
	for i := range peers {
		p := s.newPeer(i)
		net.people.add(p.owner)
		users = append(users, p.owner.userID)
	}
	if _, err := r.mach.FetchKeys(ctx, users, true); err != nil {
		t.Fatal(err)
	}
	if _, err := r.resolver.pass(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.process(ctx, s.firstSync()); err != nil {
		t.Fatal(err)
	}
	if r.db.Dialect != dbutil.SQLite {
		return s
	}
	if _, err := r.db.RawDB.Exec("PRAGMA wal_checkpoint(TRUNCATE)"); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *story) network() *network {
	return &network{oneTimeKeys: s.OneTimeKeys, left: 50, claimed: make(map[id.UserID]int), requests: make(map[string]int)}
}

// open opens a receiver on a database file, for this test.
func (s *story) open(t *testing.T, path string) *receiver {
	t.Helper()
	return s.openWith(t, safeDriver, path, 0, s.network())
}

func (s *story) openWith(t *testing.T, driver, path string, connections int, net *network) *receiver {
	t.Helper()
	r, err := openReceiver(t.Context(), driver, path, connections, net, s.bot, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// newPeer makes one of four kinds: two whom nobody has verified, one verified, one without an identity.
func (s *story) newPeer(i int) *peer {
	a := newActor(id.UserID(fmt.Sprintf("@peer%d:test", i)))
	switch i % 4 {
	case 2:
		a.verifiedBy = s.bot
	case 3:
		a.hidden = true
	}
	p := &peer{actorDevice: a.addDevice(id.DeviceID(fmt.Sprintf("PEER%d", i)))}
	p.crossSigned = !a.hidden
	s.peers = append(s.peers, p)
	s.Devices = append(s.Devices, p.device())
	if err := p.account.Internal.GenOneTimeKeys(10); err != nil {
		panic(err)
	}
	for keyID, key := range must(p.account.Internal.OneTimeKeys()) {
		oneTimeKey := object{"key": key.String()}
		signInto(oneTimeKey, a.userID, p.deviceID.String(), p.account)
		s.OneTimeKeys[a.userID] = append(s.OneTimeKeys[a.userID], object{p.deviceID.String(): object{"signed_curve25519:" + keyID: oneTimeKey}})
	}
	p.account.Internal.MarkKeysAsPublished()
	return p
}

func (p *peer) state() (State, Code) {
	switch {
	case p.owner.hidden:
		return StateDeviceInfo, CodeUnsignedDevice
	case p.owner.verifiedBy != nil:
		return StateSenderVerified, CodeVerified
	default:
		return StateSenderUnverified, CodeUnverifiedIdentity
	}
}

func (s *story) firstSync() json.RawMessage {
	return rawJSON(object{
		"next_batch": "t0", "device_one_time_keys_count": object{"signed_curve25519": 50},
		"rooms": object{"join": object{storyRoom.String(): object{"state": object{"events": []object{{
			"type": "m.room.encryption", "state_key": "", "event_id": "$encryption", "sender": receiverUser.String(),
			"content": object{"algorithm": string(id.AlgorithmMegolmV1)},
		}}}}}},
	})
}

// tell adds one /sync with a room key from each of the given peers, and a message of theirs in the room.
func (s *story) tell(from ...*peer) {
	var toDevice, timeline []object
	for _, p := range from {
		session := newMegolm(storyRoom)
		exported := must(must(olm.NewInboundGroupSession([]byte(session.key))).Export(0))
		toDevice = append(toDevice, s.encrypt(p, "m.room_key", session.roomKey()))
		s.messages++
		state, code := p.state()
		s.keys = append(s.keys, wantedKey{storyRoom, session.id(), p.senderKey(), string(exported), state})
		s.written++
		text := fmt.Sprintf("message %d", s.written)
		s.events = append(s.events, wantedEvent{id.EventID(fmt.Sprintf("$event%d", s.written)), p.owner.userID, text, code})
		timeline = append(timeline, object{
			"type": "m.room.encrypted", "event_id": fmt.Sprintf("$event%d", s.written), "sender": p.owner.userID.String(),
			"origin_server_ts": 1_700_000_000_000 + s.written, "content": session.message(text),
		})
	}
	s.Syncs = append(s.Syncs, s.sync(toDevice, timeline))
}

func (s *story) sync(toDevice, timeline []object) json.RawMessage {
	return rawJSON(object{
		"next_batch": fmt.Sprintf("t%d", len(s.Syncs)+1), "device_one_time_keys_count": object{"signed_curve25519": 50},
		"to_device": object{"events": toDevice},
		"rooms":     object{"join": object{storyRoom.String(): object{"timeline": object{"events": timeline}}}},
	})
}

// encrypt gives the to-device event with a payload of a peer, starting an Olm session if it has none.
func (s *story) encrypt(p *peer, eventType string, content object) object {
	if p.olm == nil {
		p.olm = must(p.account.Internal.NewOutboundSession(s.receiver.IdentityKey(), s.free[0]))
		s.free = s.free[1:]
		p.started = append(p.started, p.olm)
	}
	payload := rawJSON(object{
		"type": eventType, "content": content, "sender": p.owner.userID.String(),
		"sender_device_keys": p.keys(), "keys": object{"ed25519": p.signingKey().String()},
		"recipient": receiverUser.String(), "recipient_keys": object{"ed25519": s.receiver.SigningKey().String()},
	})
	messageType, body, err := p.olm.Encrypt(payload)
	if err != nil {
		panic(err)
	}
	return object{
		"type": "m.room.encrypted", "sender": p.owner.userID.String(),
		"content": object{
			"algorithm": string(id.AlgorithmOlmV1), "sender_key": p.senderKey().String(),
			"ciphertext": object{s.receiver.IdentityKey().String(): object{"type": int(messageType), "body": string(body)}},
		},
	}
}

// position is the index of the /sync that comes after the token.
func (s *story) position(token string) int {
	var position int
	if _, err := fmt.Sscanf(token, "t%d", &position); err != nil {
		panic(err)
	}
	return position
}

// feed hands the receiver the story from where its token says.
func (s *story) feed(ctx context.Context, r *receiver) error {
	for _, sync := range s.Syncs[s.position(r.token(ctx)):] {
		if err := r.process(ctx, sync); err != nil {
			return err
		}
	}
	return nil
}

// readers are the peers as they are now, able to read what the receiver sent them; each call begins anew.
func (s *story) readers(ctx context.Context) (map[id.UserID]*peer, error) {
	readers := make(map[id.UserID]*peer)
	for _, p := range s.peers {
		reader, err := p.reader(ctx, s.receiver.IdentityKey())
		if err != nil {
			return nil, err
		}
		readers[p.owner.userID] = reader
	}
	return readers, nil
}

func (p *peer) reader(ctx context.Context, receiverKey id.IdentityKey) (*peer, error) {
	key := []byte("copy")
	copied := &crypto.OlmAccount{Internal: olm.NewBlankAccount(), Shared: true}
	if err := copied.Internal.Unpickle(must(p.account.Internal.Pickle(key)), key); err != nil {
		return nil, err
	}
	store := crypto.NewMemoryStore(nil)
	store.Account = copied
	device := *p.actorDevice
	device.account = copied
	reader := &peer{actorDevice: &device, started: p.started}
	for _, started := range p.started {
		session := olm.NewBlankSession()
		if err := session.Unpickle(must(started.Pickle(key)), key); err != nil {
			return nil, err
		}
		device.olm = session
		if err := store.AddSession(ctx, receiverKey, &crypto.OlmSession{Internal: session}); err != nil {
			return nil, err
		}
	}
	client, err := mautrix.NewClient("http://server.test", p.owner.userID, "token")
	if err != nil {
		return nil, err
	}
	client.DeviceID, client.Client = p.deviceID, &http.Client{Transport: noNetwork{}}
	log := zerolog.Nop()
	reader.mach = crypto.NewOlmMachine(client, &log, store, nil)
	reader.mach.DisableDecryptKeyFetching = true
	return reader, reader.mach.Load(ctx)
}

// read decrypts everything in the body of a /sendToDevice, each message by its receiver. In order, it succeeds if and only if no
// state of a ratchet was used twice.
func read(ctx context.Context, readers map[id.UserID]*peer, body []byte) (texts []string, err error) {
	var sent struct {
		Messages map[id.UserID]map[id.DeviceID]json.RawMessage `json:"messages"`
	}
	if err = json.Unmarshal(body, &sent); err != nil {
		return nil, err
	}
	for userID, devices := range sent.Messages {
		for _, raw := range devices {
			evt := &event.Event{Sender: receiverUser, Type: event.ToDeviceEncrypted, Content: event.Content{VeryRaw: raw}}
			if err = evt.Content.ParseRaw(evt.Type); err != nil {
				return nil, err
			}
			evt.Type.Class = interceptedClass
			decrypted := readers[userID].mach.HandleEncryptedEvent(ctx, evt)
			if decrypted == nil {
				return nil, fmt.Errorf("%s cannot read a message of the receiver", userID)
			}
			text, _ := decrypted.Content.Raw["text"].(string)
			texts = append(texts, text)
		}
	}
	return texts, nil
}

// check compares everything that the receiver has stored with what the story told.
func (s *story) check(ctx context.Context, r *receiver) error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if token, last := r.token(ctx), fmt.Sprintf("t%d", len(s.Syncs)); token != last {
		fault("the token is %s, want %s", token, last)
	}
	for _, key := range s.keys {
		if err := key.check(ctx, r); err != nil {
			faults = append(faults, err)
		}
	}
	for table, want := range map[string]int{
		"crypto_megolm_inbound_session WHERE source_user<>'" + receiverUser.String() + "'": len(s.keys),
		"sendertrust_session WHERE sender<>'" + receiverUser.String() + "'":                len(s.keys),
		"crypto_olm_message_hash": s.messages,
		"sendertrust_inbox":       len(s.events),
	} {
		if got := r.count("SELECT COUNT(*) FROM " + table); got != want {
			fault("%d rows in %s, want %d", got, table, want)
		}
	}
	for _, p := range s.peers {
		sessions := must(r.uow.SQLCryptoStore.GetSessions(ctx, p.senderKey()))
		for _, started := range p.started {
			if !slices.ContainsFunc(sessions, func(session *crypto.OlmSession) bool { return session.ID() == started.ID() }) {
				fault("%s: an Olm session is missing", p.owner.userID)
			}
		}
		if len(sessions) > len(p.started)+s.encryptors {
			fault("%s: %d Olm sessions, and it has started %d", p.owner.userID, len(sessions), len(p.started))
		}
	}
	if err := s.checkOneTimeKeys(r); err != nil {
		faults = append(faults, err)
	}
	return errors.Join(faults...)
}

func (k *wantedKey) check(ctx context.Context, r *receiver) error {
	session, err := r.uow.SQLCryptoStore.GetGroupSession(ctx, k.RoomID, k.SessionID)
	if err != nil {
		return err
	} else if session == nil {
		return fmt.Errorf("room key %s is LOST", k.SessionID)
	}
	if exported := must(session.Internal.Export(session.Internal.FirstKnownIndex())); string(exported) != k.Export {
		return fmt.Errorf("room key %s is not what was sent", k.SessionID)
	}
	claims, err := r.store.claims(ctx, k.SessionID)
	if err != nil {
		return err
	}
	if len(claims) != 1 || claims[0].State != k.State || claims[0].SenderKey != k.SenderKey {
		return fmt.Errorf("room key %s has %d senders, want one in state %s", k.SessionID, len(claims), k.State)
	}
	return nil
}

// checkOneTimeKeys finds out whether the one-time keys that the peers used are gone, and no others.
func (s *story) checkOneTimeKeys(r *receiver) error {
	var left []string
	for _, key := range r.mach.GetAccount().Internal.(*goolm.Account).OTKeys {
		left = append(left, key.Key.PublicKey.B64Encoded().String())
	}
	for _, key := range s.free {
		if !slices.Contains(left, key.String()) {
			return fmt.Errorf("a one-time key is gone that nobody used")
		}
	}
	if len(left) != len(s.free) {
		return fmt.Errorf("%d one-time keys are left, want %d", len(left), len(s.free))
	}
	return nil
}

// handleAll lets the inbox hand on everything that waits in it.
func (r *receiver) handleAll(ctx context.Context) error {
	pending, err := r.store.pendingInbox(ctx, 0, 100_000)
	if err != nil {
		return err
	}
	var faults []error
	for _, e := range pending {
		if !r.inbox.handle(ctx, e) {
			faults = append(faults, fmt.Errorf("event %s has to wait", e.eventID))
		}
	}
	return errors.Join(append(faults, r.uow.flush(ctx))...)
}

// onEvent registers a handler for everything that the inbox hands on.
func (r *receiver) onEvent(handle func(seen wantedEvent)) {
	handler := func(_ context.Context, evt *event.Event) {
		verdict, _ := VerdictOf(evt)
		seen := wantedEvent{EventID: evt.ID, Sender: evt.Sender, Code: verdict.Code}
		if message, ok := evt.Content.Parsed.(*event.MessageEventContent); ok {
			seen.Body = message.Body
		}
		handle(seen)
	}
	r.syncer.OnEventType(event.EventMessage, handler)
	r.syncer.OnEventType(event.EventEncrypted, handler)
}

// checkHandled compares what handlers saw with the story: everything, at least once, always the same, and each sender's in order.
func (s *story) checkHandled(seen []wantedEvent) error {
	var faults []error
	first := make(map[id.EventID]wantedEvent)
	order := make(map[id.UserID][]id.EventID)
	for _, event := range seen {
		known, again := first[event.EventID]
		if !again {
			first[event.EventID] = event
			order[event.Sender] = append(order[event.Sender], event.EventID)
		} else if known != event {
			faults = append(faults, fmt.Errorf("a handler saw %+v, and then %+v", known, event))
		}
	}
	for _, want := range s.events {
		got, ofSender := first[want.EventID], order[want.Sender]
		if got != want {
			faults = append(faults, fmt.Errorf("a handler saw %+v, want %+v", got, want))
		} else if len(ofSender) > 0 && ofSender[0] != want.EventID {
			faults = append(faults, fmt.Errorf("a handler saw %s in the place of %s", ofSender[0], want.EventID))
		}
		order[want.Sender] = ofSender[min(1, len(ofSender)):]
	}
	return errors.Join(faults...)
}

// dump gives all rows of all tables, to tell whether anything was written.
func dump(db *sql.DB) map[string]string {
	tables := make(map[string]string)
	for _, table := range scanStrings(db, `SELECT name FROM sqlite_schema WHERE type='table' AND name NOT LIKE 'sqlite_%'`) {
		columns := scanStrings(db, `SELECT 'quote("' || name || '")' FROM pragma_table_info('`+table+`')`)
		tables[table] = strings.Join(scanStrings(db, fmt.Sprintf(`SELECT %s FROM %s ORDER BY 1`, strings.Join(columns, "||','||"), table)), "\n")
	}
	return tables
}

func scanStrings(db *sql.DB, query string) (values []string) {
	rows := must(db.Query(query))
	defer rows.Close()
	for rows.Next() {
		var value string
		if err := rows.Scan(&value); err != nil {
			panic(err)
		}
		values = append(values, value)
	}
	if err := rows.Err(); err != nil {
		panic(err)
	}
	return values
}

// faultyDriver is the driver that the program uses, with an authorizer that refuses what the test says.
const faultyDriver = "sqlite3-faulty"

// refused is what the authorizer of faultyDriver refuses now.
var refused faults

// faults says which statements fail, by SQLite's operation and the table, or the transaction's statement; and of which table the
// rows cannot be read although the statement succeeds.
type faults struct {
	mu     sync.Mutex
	refuse func(op int, name string) bool
	torn   string
}

var errTorn = errors.New("the rows are torn")

func (f *faults) set(refuse func(op int, name string) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refuse, f.torn = refuse, ""
}

func (f *faults) tear(table string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.torn = table
}

func (f *faults) tears(query string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.torn != "" && strings.Contains(query, "FROM "+f.torn)
}

func (f *faults) authorize(op int, name, _, _ string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil && f.refuse(op, name) {
		return sqlite3.SQLITE_DENY
	}
	return sqlite3.SQLITE_OK
}

type faultyConn struct{ *sqlite3.SQLiteConn }

func (c faultyConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	rows, err := c.SQLiteConn.QueryContext(ctx, query, args)
	if err == nil && refused.tears(query) {
		return tornRows{rows}, nil
	}
	return rows, err
}

type tornRows struct{ driver.Rows }

func (tornRows) Next([]driver.Value) error { return errTorn }

type faultySQLite struct{ sqlite3.SQLiteDriver }

func (d *faultySQLite) Open(name string) (driver.Conn, error) {
	conn, err := d.SQLiteDriver.Open(name)
	if err != nil {
		return nil, err
	}
	return faultyConn{conn.(*sqlite3.SQLiteConn)}, nil
}

func init() {
	sql.Register(faultyDriver, &faultySQLite{sqlite3.SQLiteDriver{ConnectHook: func(conn *sqlite3.SQLiteConn) error {
		for _, pragma := range []string{"foreign_keys = ON", "journal_mode = WAL", "synchronous = FULL", "busy_timeout = 5000"} {
			if _, err := conn.Exec("PRAGMA "+pragma, nil); err != nil {
				return err
			}
		}
		conn.RegisterAuthorizer(refused.authorize)
		return nil
	}}})
}
