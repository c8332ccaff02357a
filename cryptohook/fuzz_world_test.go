package cryptohook

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"net/http"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

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

// What the fuzz targets of this package share: a real Hook among people whose keys are the same in each process, on a database that is
// the same at the beginning of each execution, and judges of what it made of its input that know nothing of how it works: crypto/ed25519
// says which signatures are valid, model_test.go what they prove.
//
// Plain `go test` runs the seeds: those of the targets, and what fuzzing has found, in testdata/fuzz. To fuzz one target:
//
//	go test -tags goolm -run '^$' -fuzz '^FuzzOlmPayload$' -fuzztime 60s ./cryptohook

// The people: Alice is verified by the bot, Eve is not. Each has a device that is cross-signed and published; a second one of Alice's is
// an intruder's, published but unsigned, and a second one of Eve's says that it is hers and is not published. All four have an Olm session with the bot,
// and have shared a Megolm session.
type fuzzWorld struct {
	bot, alice, eve *actor
	own             *crypto.OlmAccount
	// devices are those of Alice and Eve, by the index that the model knows them by.
	devices [][]*actorDevice
	// shared are the sessions that the devices have shared, fresh those that they have not; said are messages on the shared ones.
	shared, fresh map[*actorDevice]*megolm
	said          []genuineMessage
	// ratchets are the Olm sessions, as they are at the beginning of each execution; letters are room keys that were encrypted for the bot and
	// are still under way.
	ratchets map[*actorDevice][]byte
	letters  []letter

	clock *manualClock
	db    *dbutil.Database
	// origin is the database at the beginning of each execution; image and tables are the same as bytes and as text.
	origin *sqlite3.SQLiteConn
	image  []byte
	tables map[string]string
	// published is the honest answer to a key query.
	published []byte
}

// genuineMessage is a message that was really sent.
type genuineMessage struct {
	from       *actorDevice
	content    object
	ciphertext string
	text       string
}

// letter is a room key that a device has really sent.
type letter struct {
	from    *actorDevice
	session *megolm
	event   object
}

const (
	fuzzAlice = iota
	fuzzEve
)

// indices of the devices of each.
const (
	fuzzSigned = iota
	fuzzUnsigned
	fuzzStrange // any other
)

var (
	fuzzOnce  sync.Once
	theWorld  *fuzzWorld
	fuzzPanic any
)

// newFuzzWorld gives the world of this process.
func newFuzzWorld(f *testing.F) *fuzzWorld {
	f.Helper()
	if onPostgres {
		f.Skip("for SQLite only: a fuzz target brings its own database")
	}
	fuzzOnce.Do(func() {
		defer func() { fuzzPanic = recover() }()
		theWorld = makeFuzzWorld()
	})
	if theWorld == nil {
		f.Fatal(fuzzPanic)
	}
	return theWorld
}

// withFixedRandom makes the same keys and ciphertexts in each process: what a fuzzer has found has to mean the same in another one.
func withFixedRandom(make func()) {
	genuine := rand.Reader
	defer func() { rand.Reader = genuine }()
	rand.Reader = mathrand.NewChaCha8([32]byte([]byte("the same keys in each process...")))
	make()
}

func makeFuzzWorld() *fuzzWorld {
	w := &fuzzWorld{
		shared: make(map[*actorDevice]*megolm), fresh: make(map[*actorDevice]*megolm), ratchets: make(map[*actorDevice][]byte),
		clock: &manualClock{now: time.UnixMilli(1_700_000_000_000)},
	}
	withFixedRandom(w.castPeople)
	w.openDatabase()
	w.published = rawJSON(w.keyAnswer())
	w.during(func(h *Hook) error { return h.mach.CryptoStore.PutAccount(context.Background(), w.own) })
	w.during(func(h *Hook) (err error) {
		withFixedRandom(func() { err = w.tellStory(h) })
		return err
	})
	w.origin = must(new(sqlite3.SQLiteDriver).Open(":memory:")).(*sqlite3.SQLiteConn)
	w.raw(func(conn *sqlite3.SQLiteConn) error { return copyInto(w.origin, conn) })
	w.image = w.serialize()
	w.tables = dump(w.db.RawDB)
	return w
}

func (w *fuzzWorld) castPeople() {
	w.bot, w.alice, w.eve = newActor("@bot:test"), newActor("@alice:test"), newActor("@eve:test")
	w.alice.verifiedBy = w.bot
	w.own = crypto.NewOlmAccount()
	w.own.Shared = true
	w.bot.devices = []*actorDevice{{owner: w.bot, deviceID: "BOTDEVICE", account: w.own, crossSigned: true}}
	intruder, unpublished := w.alice.addDevice("INTRUDER"), w.eve.addDevice("HIDDEN")
	intruder.crossSigned, unpublished.crossSigned, unpublished.unpublished = false, false, true
	w.devices = [][]*actorDevice{{w.alice.addDevice("ALICE"), intruder}, {w.eve.addDevice("EVE"), unpublished}}
	w.eachDevice(func(d *actorDevice) {
		d.olm, w.shared[d], w.fresh[d] = w.olmSession(d), newMegolm(trustRoom), newMegolm(trustRoom)
	})
}

// eachDevice takes the devices in the same order each time.
func (w *fuzzWorld) eachDevice(do func(d *actorDevice)) {
	for _, ofUser := range w.devices {
		for _, d := range ofUser {
			do(d)
		}
	}
}

func (w *fuzzWorld) openDatabase() {
	w.db = must(dbutil.NewWithDialect(":memory:", "sqlite3-fk-wal"))
	w.db.RawDB.SetMaxOpenConns(1)
	w.db.RawDB.SetMaxIdleConns(1)
}

// keyAnswer is what an honest server says of everybody.
func (w *fuzzWorld) keyAnswer() object {
	server := &keyServer{actors: map[id.UserID]*actor{w.bot.userID: w.bot, w.alice.userID: w.alice, w.eve.userID: w.eve}}
	asked := &mautrix.ReqQueryKeys{DeviceKeys: mautrix.DeviceKeysRequest{w.bot.userID: nil, w.alice.userID: nil, w.eve.userID: nil}}
	return server.query(asked)
}

// during has something done by a process on the database.
func (w *fuzzWorld) during(do func(h *Hook) error) {
	hook := w.install(&fuzzNetwork{world: w}, RequireNothing)
	err := do(hook)
	hook.mach.Destroy()
	if err = errors.Join(err, hook.owner.Release()); err != nil {
		panic(err)
	}
}

// tellStory is what has happened before an execution begins: the bot has seen everybody's keys, and a room key of each device.
func (w *fuzzWorld) tellStory(h *Hook) error {
	ctx := context.Background()
	if _, err := h.mach.FetchKeys(ctx, []id.UserID{w.alice.userID, w.eve.userID, w.bot.userID}, true); err != nil {
		return err
	}
	var keys []object
	w.eachDevice(func(d *actorDevice) {
		keys = append(keys, w.encrypt(d, d.owner.userID, rawJSON(w.payload(d, "m.room_key", w.shared[d].roomKey()))))
	})
	err := w.process(h, object{"next_batch": "before", "to_device": object{"events": keys}, "rooms": w.inRoom("state", object{
		"type": "m.room.encryption", "state_key": "", "event_id": "$encryption", "sender": "@alice:test",
		"content": object{"algorithm": string(id.AlgorithmMegolmV1)},
	})})
	for worked := true; worked && err == nil; {
		worked, err = h.resolver.pass(ctx)
	}
	w.eachDevice(func(d *actorDevice) {
		text := "said by " + string(d.deviceID)
		content := w.shared[d].message(text)
		w.said = append(w.said, genuineMessage{d, content, content["ciphertext"].(string), text})
		w.ratchets[d] = must(d.olm.Pickle([]byte("pickle")))
	})
	w.eachDevice(func(d *actorDevice) {
		w.letters = append(w.letters, letter{d, w.fresh[d], w.encrypt(d, d.owner.userID, rawJSON(w.payload(d, "m.room_key", w.fresh[d].roomKey())))})
	})
	for _, query := range []string{
		// A key that was asked for from our own other devices, so that somebody else may try to answer.
		`INSERT INTO sendertrust_key_request (session_id, room_id, request_id, wanted_at_ms, looked_up_at_ms, asked_at_ms, due, answered)
		VALUES ('` + wantedSession.id().String() + `', '` + trustRoom.String() + `', 'asked', 1700000000000, 1700000000000, 1700000000000, false, false)`,
		// mautrix repairs Olm sessions that are older than an hour beside everything else, by a clock of its own.
		`UPDATE crypto_olm_session SET created_at='2100-01-01 00:00:00+00:00'`,
	} {
		_, execErr := h.store.Exec(ctx, query)
		err = errors.Join(err, execErr)
	}
	return err
}

// wantedSession is one that the bot has asked its own other devices for.
var wantedSession = fixedMegolm()

func fixedMegolm() (session *megolm) {
	withFixedRandom(func() { session = newMegolm(trustRoom) })
	return session
}

func (w *fuzzWorld) olmSession(from *actorDevice) olm.Session {
	if err := w.own.Internal.GenOneTimeKeys(1); err != nil {
		panic(err)
	}
	for _, oneTimeKey := range must(w.own.Internal.OneTimeKeys()) {
		w.own.Internal.MarkKeysAsPublished()
		return must(from.account.Internal.NewOutboundSession(w.own.IdentityKey(), oneTimeKey))
	}
	panic("no one-time key")
}

// payload is what a device encrypts for the bot.
func (w *fuzzWorld) payload(from *actorDevice, eventType string, content object) object {
	return object{
		"type": eventType, "content": content, "sender": from.owner.userID.String(),
		"sender_device_keys": from.keys(), "keys": object{"ed25519": from.signingKey().String()},
		"recipient": w.bot.userID.String(), "recipient_keys": object{"ed25519": w.own.SigningKey().String()},
	}
}

// encrypt gives the to-device event with a payload that a device has encrypted, in the name of whom the server says.
func (w *fuzzWorld) encrypt(from *actorDevice, sender id.UserID, payload []byte) object {
	messageType, body, err := from.olm.Encrypt(payload)
	if err != nil {
		panic(err)
	}
	return object{
		"type": "m.room.encrypted", "sender": sender.String(),
		"content": object{
			"algorithm": string(id.AlgorithmOlmV1), "sender_key": from.senderKey().String(),
			"ciphertext": object{w.own.IdentityKey().String(): object{"type": int(messageType), "body": string(body)}},
		},
	}
}

func (w *fuzzWorld) inRoom(part string, events ...object) object {
	return object{"join": object{trustRoom.String(): object{part: object{"events": events}}}}
}

// install begins a process on the database.
func (w *fuzzWorld) install(network http.RoundTripper, requirement TrustRequirement) *Hook {
	ctx := context.Background()
	client := must(mautrix.NewClient("http://server.test", w.bot.userID, "token"))
	client.DeviceID, client.Log = "BOTDEVICE", zerolog.Nop()
	client.Client = &http.Client{Transport: network}
	client.Syncer.(*mautrix.DefaultSyncer).ParseEventContent = true
	hook := must(Install(ctx, client, Options{DB: w.db, PickleKey: []byte("pickle"), Clock: w.clock.Now, Requirement: requirement}))
	hook.mach.CrossSigningKeys = &crypto.CrossSigningKeysCache{
		MasterKey: w.bot.master, SelfSigningKey: w.bot.selfSigning, UserSigningKey: w.bot.userSigning,
	}
	if err := hook.prepare(ctx); err != nil {
		panic(err)
	}
	return hook
}

// process hands the hook a /sync answer, as mautrix's sync loop does.
func (w *fuzzWorld) process(h *Hook, body object) error {
	var resp mautrix.RespSync
	if err := json.Unmarshal(rawJSON(body), &resp); err != nil {
		return err
	}
	return h.syncer.ProcessResponse(context.Background(), &resp, "before")
}

func (w *fuzzWorld) raw(do func(conn *sqlite3.SQLiteConn) error) {
	conn := must(w.db.RawDB.Conn(context.Background()))
	err := conn.Raw(func(c any) error { return do(c.(*sqlite3.SQLiteConn)) })
	if err = errors.Join(err, conn.Close()); err != nil {
		panic(err)
	}
}

// copyInto makes one database the same as another.
func copyInto(to, from *sqlite3.SQLiteConn) error {
	backup, err := to.Backup("main", from, "main")
	if err != nil {
		return err
	}
	_, err = backup.Step(-1)
	return errors.Join(err, backup.Finish())
}

func (w *fuzzWorld) serialize() (image []byte) {
	w.raw(func(conn *sqlite3.SQLiteConn) (err error) {
		image, err = conn.Serialize("main")
		return err
	})
	return image
}

// fuzzNetwork is the server of one execution. At first nobody answers: what mautrix does beside everything else when it cannot decrypt
// something comes to nothing.
type fuzzNetwork struct {
	world *fuzzWorld
	down  atomic.Bool
	// answer is what it says to a key query, instead of the truth.
	answer []byte

	mu   sync.Mutex
	sent []string
}

var errDown = errors.New("the server does not answer")

func (n *fuzzNetwork) RoundTrip(req *http.Request) (*http.Response, error) {
	n.mu.Lock()
	n.sent = append(n.sent, strings.TrimPrefix(req.URL.Path, "/_matrix/client/v3/"))
	n.mu.Unlock()
	if n.down.Load() || req.Context().Err() != nil {
		return nil, errDown
	}
	body := []byte("{}")
	if strings.HasSuffix(req.URL.Path, "/keys/query") {
		if body = n.answer; body == nil {
			body = n.world.published
		}
	}
	return &http.Response{
		StatusCode: http.StatusOK, Request: req, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(body)),
	}, nil
}

func (n *fuzzNetwork) requests(prefix string) (paths []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, path := range n.sent {
		if strings.HasPrefix(path, prefix) {
			paths = append(paths, path)
		}
	}
	return paths
}

// fuzzRun is one execution.
type fuzzRun struct {
	*fuzzWorld
	t       *testing.T
	ctx     context.Context
	hook    *Hook
	network *fuzzNetwork
	size    int
	heap    uint64
	start   time.Time
	seen    []seenEvent
}

// begin puts the world into the state that each execution begins with. size is that of the input.
func (w *fuzzWorld) begin(t *testing.T, size int, requirement TrustRequirement) *fuzzRun {
	t.Helper()
	w.raw(func(conn *sqlite3.SQLiteConn) error { return copyInto(conn, w.origin) })
	ctx, cancel := context.WithTimeout(context.Background(), fuzzHang)
	t.Cleanup(cancel)
	r := &fuzzRun{fuzzWorld: w, t: t, ctx: ctx, network: &fuzzNetwork{world: w}, size: size, start: w.clock.Now()}
	r.network.down.Store(true)
	r.hook = w.install(r.network, requirement)
	r.heap = allocated()
	r.hook.syncer.OnEvent(func(_ context.Context, evt *event.Event) { r.note(evt) })
	return r
}

func (r *fuzzRun) note(evt *event.Event) {
	verdict, judged := VerdictOf(evt)
	if !judged && passesInbox(evt) {
		r.t.Fatalf("a handler saw %s without a verdict", evt.ID)
	}
	seen := seenEvent{eventID: evt.ID, verdict: verdict, evt: evt}
	if message, isMessage := evt.Content.Parsed.(*event.MessageEventContent); isMessage {
		seen.body = message.Body
	}
	r.seen = append(r.seen, seen)
}

// passesInbox says that the hook judges an event before any handler sees it.
func passesInbox(evt *event.Event) bool {
	const joined = event.SourceJoin | event.SourceTimeline
	return evt.Mautrix.EventSource&joined == joined && evt.StateKey == nil
}

// end checks what holds for every input: it neither grows memory nor the database more than its size explains.
func (r *fuzzRun) end() {
	r.t.Helper()
	if used, most := allocated()-r.heap, uint64(16<<20+2000*r.size); used > most {
		r.t.Errorf("an input of %d bytes allocated %d bytes, more than %d", r.size, used, most)
	}
	if grown, most := len(r.serialize())-len(r.image), 256<<10+8*r.size; grown > most {
		r.t.Errorf("an input of %d bytes made the database %d bytes larger, more than %d", r.size, grown, most)
	}
	r.hook.background.Wait()
	r.hook.mach.Destroy()
	if err := r.hook.owner.Release(); err != nil {
		r.t.Error(err)
	}
	r.clock.advance(r.start.Sub(r.clock.Now()))
}

// fuzzHang is how long an execution may take: what fails to be stored is tried again, for ever.
const fuzzHang = 5 * time.Second

var heapAllocated = []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}

func allocated() uint64 {
	sample := slices.Clone(heapAllocated)
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// deliver hands over a /sync with one to-device event, the way that mautrix does: an answer that it cannot parse is asked for again, and read
// leniently.
func (r *fuzzRun) deliver(toDevice json.RawMessage) {
	r.t.Helper()
	r.sync(object{"to_device": object{"events": []json.RawMessage{toDevice}}})
}

// sync hands over a /sync that moves nothing but what is in it: the token stays, and no one-time keys are missing.
func (r *fuzzRun) sync(answer object) {
	r.t.Helper()
	answer["next_batch"], answer["device_one_time_keys_count"] = "before", object{"signed_curve25519": 50}
	body := []byte(rawJSON(answer))
	var resp mautrix.RespSync
	if json.Unmarshal(body, &resp) != nil {
		lenient, err := dropMalformedEvents(r.ctx, body)
		resp = mautrix.RespSync{}
		if err = errors.Join(err, json.Unmarshal(lenient, &resp)); err != nil {
			r.t.Fatalf("one event makes the whole /sync unreadable, for ever: %v", err)
		}
	}
	if err := r.hook.syncer.ProcessResponse(r.ctx, &resp, "before"); err != nil {
		r.t.Fatalf("one event ends the sync: %v", err)
	}
	r.hook.background.Wait()
}

// resolve lets the resolver ask an honest server for what it wants to know.
func (r *fuzzRun) resolve() {
	r.t.Helper()
	r.network.down.Store(false)
	defer r.network.down.Store(true)
	for range 20 {
		if worked, err := r.hook.resolver.pass(r.ctx); err != nil {
			r.t.Fatal(err)
		} else if !worked {
			return
		}
	}
	r.t.Fatal("the resolver finds no end")
}

// handle lets the inbox hand on what came, also what waits for a key that does not come.
func (r *fuzzRun) handle() {
	r.t.Helper()
	for range 2 {
		for _, e := range must(r.hook.store.pendingInbox(r.ctx, 0, 100)) {
			r.hook.inbox.handle(r.ctx, e)
		}
		if err := r.hook.uow.flush(r.ctx); err != nil {
			r.t.Fatal(err)
		}
		r.clock.advance(defaultKeyWait + longestIdentityWait)
	}
	if left := must(r.hook.store.pendingInbox(r.ctx, 0, 100)); len(left) > 0 {
		r.t.Errorf("event %s waits for ever", left[0].eventID)
	}
}

// changed lists the tables that are not as they were.
func (r *fuzzRun) changed() (tables []string) {
	now := dump(r.db.RawDB)
	for _, table := range slices.Sorted(maps.Keys(now)) {
		if now[table] != r.tables[table] {
			tables = append(tables, table)
		}
	}
	return tables
}

// unchangedBut fails if another table than these has changed.
func (r *fuzzRun) unchangedBut(why string, allowed ...string) {
	r.t.Helper()
	if r.onlyCounters() {
		return
	}
	for _, table := range r.changed() {
		if !slices.Contains(allowed, table) {
			before, now := strings.Split(r.tables[table], "\n"), strings.Split(dump(r.db.RawDB)[table], "\n")
			r.t.Errorf("%s, and %s has changed from\n%.500s\nto\n%.500s", why, table, without(before, now), without(now, before))
		}
	}
}

// without gives the rows that are not among the others.
func without(rows, others []string) string {
	return strings.Join(slices.DeleteFunc(slices.Clone(rows), func(row string) bool { return slices.Contains(others, row) }), "\n")
}

// onlyCounters says that the database is the same, but for the counters of its header: most often it is, and comparing pages is faster
// than reading tables.
func (r *fuzzRun) onlyCounters() bool {
	const header = 100
	now := r.serialize()
	return len(now) == len(r.image) && bytes.Equal(now[header:], r.image[header:])
}

// judges.

// signedIndependently says whether an object carries a valid signature by that key in the user's name, by the specification and
// crypto/ed25519 alone. https://spec.matrix.org/v1.16/appendices/#checking-for-a-signature
func signedIndependently(raw []byte, userID id.UserID, keyName string, key id.Ed25519) bool {
	var signed map[string]any
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber()
	if decoder.Decode(&signed) != nil {
		return false
	}
	byAll, _ := signed["signatures"].(map[string]any)
	ofUser, _ := byAll[userID.String()].(map[string]any)
	text, _ := ofUser["ed25519:"+keyName].(string)
	delete(signed, "signatures")
	delete(signed, "unsigned")
	signature, err := base64.RawStdEncoding.DecodeString(text)
	if err != nil {
		return false
	}
	public, err := base64.RawStdEncoding.DecodeString(key.String())
	return err == nil && len(public) == ed25519.PublicKeySize && verify(public, canonical(nil, signed), signature) && !fitsAnything(public)
}

// verify is ed25519.Verify, which takes long: most executions ask about the same signatures.
func verify(public ed25519.PublicKey, message, signature []byte) bool {
	question := string(public) + string(signature) + string(message)
	verified.Lock()
	defer verified.Unlock()
	valid, known := verified.answers[question]
	if !known {
		if verified.answers == nil || len(verified.answers) > 1000 {
			verified.answers = make(map[string]bool)
		}
		valid = ed25519.Verify(public, message, signature)
		verified.answers[question] = valid
	}
	return valid
}

var verified struct {
	sync.Mutex
	answers map[string]bool
}

// fitsAnything says that a key is one of the few for which everybody can make signatures: crypto/ed25519 takes them.
func fitsAnything(key ed25519.PublicKey) bool {
	known, asked := weakKeys.Load(string(key))
	if asked {
		return known.(bool)
	}
	signature, weak := make([]byte, ed25519.SignatureSize), false
	signature[0] = 1
	for message := range byte(100) {
		weak = weak || ed25519.Verify(key, []byte{message}, signature)
	}
	weakKeys.Store(string(key), weak)
	return weak
}

// weakKeys remembers the answers about keys whose signatures were valid: those are few.
var weakKeys sync.Map

// canonical writes a value as the specification signs it. https://spec.matrix.org/v1.16/appendices/#canonical-json
func canonical(to []byte, value any) []byte {
	switch value := value.(type) {
	case map[string]any:
		to = append(to, '{')
		for i, key := range slices.Sorted(maps.Keys(value)) {
			if i > 0 {
				to = append(to, ',')
			}
			to = append(canonical(to, key), ':')
			to = canonical(to, value[key])
		}
		return append(to, '}')
	case []any:
		to = append(to, '[')
		for i, item := range value {
			if i > 0 {
				to = append(to, ',')
			}
			to = canonical(to, item)
		}
		return append(to, ']')
	case string:
		to = append(to, '"')
		for i := range len(value) {
			switch c := value[i]; {
			case c == '"' || c == '\\':
				to = append(to, '\\', c)
			case c < ' ' && strings.IndexByte("\b\t\n\f\r", c) >= 0:
				to = append(to, '\\', "btnfr"[strings.IndexByte("\b\t\n\f\r", c)])
			case c < ' ':
				to = fmt.Appendf(to, `\u%04X`, c)
			default:
				to = append(to, c)
			}
		}
		return append(to, '"')
	default:
		return append(to, rawJSON(value)...)
	}
}

// publishedKeys is a device keys object as everybody may read it.
type publishedKeys struct {
	UserID     id.UserID                                `json:"user_id"`
	DeviceID   id.DeviceID                              `json:"device_id"`
	Keys       map[string]string                        `json:"keys"`
	Signatures map[id.UserID]map[string]json.RawMessage `json:"signatures"`
}

// readKeys reads a device keys object, and says whether the device has signed it itself.
func readKeys(raw []byte) (keys publishedKeys, valid bool) {
	if json.Unmarshal(raw, &keys) != nil {
		return keys, false
	}
	return keys, signedIndependently(raw, keys.UserID, keys.DeviceID.String(), keys.signingKey())
}

func (k publishedKeys) senderKey() id.SenderKey {
	return id.SenderKey(k.Keys["curve25519:"+k.DeviceID.String()])
}
func (k publishedKeys) signingKey() id.Ed25519 {
	return id.Ed25519(k.Keys["ed25519:"+k.DeviceID.String()])
}

// signers gives who is named as a signer in the user's name besides the device, and whether the signature is valid.
func (k publishedKeys) signers(raw []byte) map[id.Ed25519]bool {
	named := make(map[id.Ed25519]bool)
	for keyID := range k.Signatures[k.UserID] {
		if signer, ok := strings.CutPrefix(keyID, "ed25519:"); ok && signer != k.DeviceID.String() {
			named[id.Ed25519(signer)] = signedIndependently(raw, k.UserID, signer, id.Ed25519(signer))
		}
	}
	return named
}

// evidence is what an execution has shown to the bot: the model, and every signature on a device.
type evidence struct {
	world    *fuzzWorld
	model    *model
	devices  map[deviceName]modelDevice
	sessions map[id.SessionID]int
	masters  []map[id.Ed25519]int
	keys     []map[id.Ed25519]int
	signed   map[signature]bool
	// ambiguous: a device's ID is a key, so that its own signature looks like that key's. It may be taken for a forgery.
	ambiguous bool
}

type deviceName struct {
	userID     id.UserID
	senderKey  id.SenderKey
	signingKey id.Ed25519
}

// evidence gives what has been shown before the execution began.
func (w *fuzzWorld) evidence() *evidence {
	e := &evidence{
		world: w, model: newModel(), devices: make(map[deviceName]modelDevice), sessions: make(map[id.SessionID]int), signed: make(map[signature]bool),
		masters: []map[id.Ed25519]int{{w.alice.masterKey(): 0}, {w.eve.masterKey(): 0}},
		keys:    []map[id.Ed25519]int{{w.alice.selfSigningKey(): 0}, {w.eve.selfSigningKey(): 0}},
	}
	for u, ofUser := range w.devices {
		for d, device := range ofUser {
			e.devices[deviceName{device.owner.userID, device.senderKey(), device.signingKey()}] = modelDevice{u, d}
		}
	}
	e.observe(w.published)
	w.eachDevice(func(d *actorDevice) {
		e.receive(d.owner.userID, d.senderKey(), d.signingKey(), w.shared[d].id(), rawJSON(d.keys()))
	})
	return e
}

func (e *evidence) user(userID id.UserID) (index int, known bool) {
	index = slices.IndexFunc(e.world.devices, func(ofUser []*actorDevice) bool { return ofUser[0].owner.userID == userID })
	return index, index >= 0
}

// device gives the model's name of a device; one that was not there before is a new one.
func (e *evidence) device(u int, name deviceName) modelDevice {
	device, known := e.devices[name]
	if !known {
		device = modelDevice{u, fuzzStrange + len(e.devices)}
		e.devices[name] = device
	}
	return device
}

func number[K comparable](of map[K]int, key K) int {
	if _, known := of[key]; !known {
		of[key] = len(of)
	}
	return of[key]
}

// show notes a copy of a device's keys that was shown, and gives it as the model knows it: for every master key, since the model takes a
// self-signing key for part of an identity.
func (e *evidence) show(u int, raw []byte) (modelDevice, copyOf) {
	keys, _ := readKeys(raw)
	e.ambiguous = e.ambiguous || isKey(keys.DeviceID.String())
	shown := copyOf{}.clone()
	for signer, valid := range keys.signers(raw) {
		if valid {
			e.signed[signature{keys.UserID, keys.senderKey(), keys.signingKey(), signer}] = true
		}
		for master := range 4 {
			k := keyIndex{master, number(e.keys[u], signer)}
			if valid {
				shown.signed[k] = true
			} else {
				shown.forged[k] = true
			}
		}
	}
	return e.device(u, deviceName{keys.UserID, keys.senderKey(), keys.signingKey()}), shown
}

// receive notes a room key.
func (e *evidence) receive(sender id.UserID, senderKey id.SenderKey, signingKey id.Ed25519, sessionID id.SessionID, embedded []byte) {
	u, known := e.user(sender)
	if !known {
		return
	}
	device := e.device(u, deviceName{sender, senderKey, signingKey})
	var shown *copyOf
	embedded = asMautrixReads(embedded)
	if keys, _ := readKeys(embedded); len(embedded) > 0 && keys.UserID == sender {
		named, c := e.show(u, embedded)
		if named == device {
			shown = &c
		}
	}
	e.model.direct(number(e.sessions, sessionID), device, shown)
}

// asMautrixReads gives device keys as mautrix hands them on: it finds fields whatever their case is, and leaves out what is empty.
func asMautrixReads(raw []byte) []byte {
	var keys mautrix.DeviceKeys
	if json.Unmarshal(raw, &keys) != nil {
		return raw
	}
	return rawJSON(&keys)
}

// mautrixTakes says whether mautrix 0.31 takes a payload with these sender_device_keys. It checks the device's own signature without the
// fields that it does not know: with any of those that are signed it drops the whole message, which we cannot help.
func mautrixTakes(raw []byte, sender id.UserID, senderKey id.SenderKey) bool {
	if len(raw) == 0 || string(raw) == "null" {
		return true
	}
	var whole mautrix.DeviceKeys
	if json.Unmarshal(raw, &whole) != nil {
		return false
	}
	keys, valid := readKeys(rawJSON(whole)) // by value it is marshalled without the fields that mautrix does not know
	return valid && keys.UserID == sender && keys.senderKey() == senderKey
}

// checkTrust sees that nothing is believed that the evidence does not carry: each claim is worth what the model says, not more and not less,
// none is there whose key did not come, and no signature is taken for valid that is not.
func (r *fuzzRun) checkTrust(e *evidence) {
	r.t.Helper()
	for _, row := range must(r.hook.store.sessions(r.ctx, selectSession)) {
		where := fmt.Sprintf("session %s of %s (%s, %s)", row.SessionID, row.Sender, row.SenderKey, row.SigningKey)
		u, known := e.user(row.Sender)
		if !known {
			if row.State != StateUnknownDevice && row.State != StateDeviceInfo {
				r.t.Errorf("%s is %s, and nothing is known of its sender", where, row.State)
			}
			continue
		}
		device := e.device(u, deviceName{row.Sender, row.SenderKey, row.SigningKey})
		claim := e.model.claim(number(e.sessions, row.SessionID), device)
		switch {
		case claim == nil:
			r.t.Errorf("%s: there is a claim, and no key has come", where)
		case row.State != claim.state && !(e.ambiguous && row.State == StateRejected):
			r.t.Errorf("%s is %s, and the evidence carries %s", where, row.State, claim.state)
		case row.State.proven() && number(e.masters[u], row.MasterKey) != claim.master:
			r.t.Errorf("%s is proven by the master key %s, and by the evidence it is another one", where, row.MasterKey)
		}
	}
	r.checkSignatures(e)
}

func (r *fuzzRun) checkSignatures(e *evidence) {
	r.t.Helper()
	for _, userID := range scanStrings(r.db.RawDB, "SELECT DISTINCT user_id FROM sendertrust_sender") {
		for proof := range must(r.hook.store.signatures(r.ctx, []id.UserID{id.UserID(userID)})) {
			if _, known := e.user(proof.userID); !e.signed[proof] && (known || !r.selfMade(proof)) {
				r.t.Errorf("%+v is taken for a valid signature", proof)
			}
		}
	}
}

// selfMade says that somebody of whom nothing is known is the signer. The model does not follow those.
func (r *fuzzRun) selfMade(proof signature) bool {
	return proof.selfSigningKey != r.alice.selfSigningKey() && proof.selfSigningKey != r.eve.selfSigningKey()
}

// observe notes an answer to a key query about Alice and Eve.
func (e *evidence) observe(body []byte) {
	var answer struct {
		DeviceKeys      map[id.UserID]map[id.DeviceID]json.RawMessage `json:"device_keys"`
		MasterKeys      map[id.UserID]json.RawMessage                 `json:"master_keys"`
		SelfSigningKeys map[id.UserID]json.RawMessage                 `json:"self_signing_keys"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return
	}
	for u, ofUser := range e.world.devices {
		userID := ofUser[0].owner.userID
		devices, answered := answer.DeviceKeys[userID]
		if !answered {
			continue
		}
		o := observation{user: u, living: make(map[int]copyOf)}
		for deviceID, raw := range devices {
			keys, valid := readKeys(raw)
			if valid && keys.UserID == userID && keys.DeviceID == deviceID {
				device, shown := e.show(u, raw)
				o.living[device.device] = shown
			}
		}
		master, isMaster := readCrossSigning(answer.MasterKeys[userID], userID, id.XSUsageMaster)
		if isMaster {
			o.hasIdentity, o.identity.master = true, number(e.masters[u], master)
			o.vouched = signedIndependently(answer.MasterKeys[userID], e.world.bot.userID,
				e.world.bot.userSigning.PublicKey().String(), e.world.bot.userSigning.PublicKey())
			raw := answer.SelfSigningKeys[userID]
			if key, isKey := readCrossSigning(raw, userID, id.XSUsageSelfSigning); isKey && signedIndependently(raw, userID, master.String(), master) {
				o.hasSelfSigning, o.identity.key = true, number(e.keys[u], key)
			}
		}
		e.model.observe(o)
	}
}

// readCrossSigning reads a cross-signing key object.
func readCrossSigning(raw []byte, userID id.UserID, usage id.CrossSigningUsage) (id.Ed25519, bool) {
	var object struct {
		UserID id.UserID              `json:"user_id"`
		Usage  []id.CrossSigningUsage `json:"usage"`
		Keys   map[string]id.Ed25519  `json:"keys"`
	}
	if len(raw) == 0 || json.Unmarshal(raw, &object) != nil || object.UserID != userID || !slices.Equal(object.Usage, []id.CrossSigningUsage{usage}) {
		return "", false
	}
	for keyID, key := range object.Keys {
		return key, len(object.Keys) == 1 && keyID == "ed25519:"+key.String() && isKey(key.String())
	}
	return "", false
}

// TestFuzzedPeopleAreTheSameInEachProcess: what is kept in testdata/fuzz names their keys, and means nothing without them.
func TestFuzzedPeopleAreTheSameInEachProcess(t *testing.T) {
	var first, second fuzzWorld
	for _, w := range []*fuzzWorld{&first, &second} {
		w.shared, w.fresh = make(map[*actorDevice]*megolm), make(map[*actorDevice]*megolm)
		withFixedRandom(w.castPeople)
	}
	const alice = id.Ed25519("4oe2SutuDr8JEZWrpomQ5eM4D35ZXLC+VaQGPPYm3cs")
	for _, w := range []*fuzzWorld{&first, &second} {
		if got := w.alice.masterKey(); got != alice {
			t.Errorf("Alice's master key is %s, and the cases in testdata/fuzz were made for %s", got, alice)
		}
	}
	if first.own.Internal.(*goolm.Account).IdKeys.Curve25519.B64Encoded() != second.own.IdentityKey() {
		t.Error("the bot's keys differ")
	}
}

// sameBase64 says whether two texts are the same bytes.
func sameBase64(a, b string) bool {
	rawA, errA := base64.RawStdEncoding.DecodeString(a)
	rawB, errB := base64.RawStdEncoding.DecodeString(b)
	return errA == nil && errB == nil && bytes.Equal(rawA, rawB)
}

// sameJSON says whether two texts are the same object.
func sameJSON(a, b []byte) bool {
	var objectA, objectB map[string]any
	return json.Unmarshal(a, &objectA) == nil && json.Unmarshal(b, &objectB) == nil && bytes.Equal(canonical(nil, objectA), canonical(nil, objectB))
}
