package cryptohook

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
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
	"pgregory.net/rapid"
)

// Random histories against a model that keeps the whole history and judges from first principles (model_test.go). What happens goes
// through the real Hook on a real SQLite database: room keys from the decrypted Olm event on, key queries from their HTTP answers on.
//
// `make test` walks 100,000 steps in histories of 100, `make histories` other ones; `go test` alone 3,000. What a failure shrinks to becomes
// a test, or a story of testdata/truth.yaml.

const (
	historyUsers    = 2
	historyDevices  = 3 // of each user
	historyMasters  = 3
	historyKeys     = 2 // self-signing keys of each master key
	historySessions = 5
)

// cast are the people of all histories, made once: keys are expensive.
type cast struct {
	users    []*player
	sessions []*megolm
	bot      *actor
}

type player struct {
	userID  id.UserID
	masters []olm.PKSigning
	// selfSigning are the self-signing keys, by master key.
	selfSigning [][]olm.PKSigning
	devices     []*actorDevice
}

// keyIndex names a self-signing key: which master key's, and which of them.
type keyIndex struct{ master, key int }

var theCast = sync.OnceValue(func() *cast {
	c := &cast{bot: newActor("@bot:test")}
	for u := range historyUsers {
		p := &player{userID: id.UserID(fmt.Sprintf("@user%d:test", u))}
		for range historyMasters {
			p.masters = append(p.masters, must(olm.NewPKSigning()))
			var keys []olm.PKSigning
			for range historyKeys {
				keys = append(keys, must(olm.NewPKSigning()))
			}
			p.selfSigning = append(p.selfSigning, keys)
		}
		owner := &actor{userID: p.userID}
		for d := range historyDevices {
			p.devices = append(p.devices, &actorDevice{owner: owner, deviceID: id.DeviceID(fmt.Sprintf("DEVICE%d", d)), account: crypto.NewOlmAccount()})
		}
		c.users = append(c.users, p)
	}
	for range historySessions {
		c.sessions = append(c.sessions, newMegolm(trustRoom))
	}
	return c
})

func (p *player) ssk(k keyIndex) olm.PKSigning { return p.selfSigning[k.master][k.key] }

// copyOf is a device's keys object as it may be shown: by whom it is signed, and by whom it pretends to be.
type copyOf struct {
	signed, forged map[keyIndex]bool
}

func (c copyOf) clone() copyOf {
	clone := copyOf{make(map[keyIndex]bool), make(map[keyIndex]bool)}
	for k, v := range c.signed {
		clone.signed[k] = v
	}
	for k, v := range c.forged {
		clone.forged[k] = v
	}
	return clone
}

func (p *player) deviceKeys(d int, c copyOf) object {
	device := p.devices[d]
	keys := device.selfSignedKeys()
	for k := range c.signed {
		signInto(keys, p.userID, p.ssk(k).PublicKey().String(), p.ssk(k))
	}
	for k := range c.forged {
		putSignature(keys, p.userID, p.ssk(k).PublicKey().String(), fixedForgery)
	}
	return keys
}

var fixedForgery = forgedSignature()

// shown is what the server shows of a user now.
type shown struct {
	away, hidden, noSelfSigning bool
	identity                    keyIndex
	// vouched are the master keys that our user-signing key has signed.
	vouched map[int]bool
	devices map[int]*shownDevice
}

type shownDevice struct {
	copyOf
	stripped, gone bool
}

// history is one random history: the server, the hook, and the model.
type history struct {
	t     *rapid.T
	ctx   context.Context
	clock *manualClock
	cast  *cast
	model *model
	steps int

	server []*shown
	down   bool
	// meanwhile is what happens between a question and its answer.
	meanwhile func()
	pins      map[id.UserID]id.Ed25519

	db      *dbutil.Database
	client  *mautrix.Client
	hook    *Hook
	options Options
}

// RoundTrip is the network.
func (h *history) RoundTrip(req *http.Request) (*http.Response, error) {
	status, answer := http.StatusOK, object{}
	switch req.URL.Path {
	case "/_matrix/client/v3/keys/query":
		var asked mautrix.ReqQueryKeys
		if err := json.NewDecoder(req.Body).Decode(&asked); err != nil {
			return nil, err
		}
		if h.down {
			status = http.StatusBadGateway
			break
		}
		var seen []observation
		answer, seen = h.answer(asked)
		if meanwhile := h.meanwhile; meanwhile != nil {
			h.meanwhile = nil
			meanwhile()
		}
		for _, o := range seen {
			h.model.observe(o)
		}
	case "/_matrix/client/v3/keys/signatures/upload":
		var uploaded map[id.UserID]map[string]json.RawMessage
		if err := json.NewDecoder(req.Body).Decode(&uploaded); err != nil {
			return nil, err
		}
		for u, p := range h.cast.users {
			for m, master := range p.masters {
				if uploaded[p.userID][master.PublicKey().String()] != nil {
					h.server[u].vouched[m] = true
				}
			}
		}
	}
	return &http.Response{
		StatusCode: status, Request: req, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(rawJSON(answer))),
	}, nil
}

// answer is what the server says of the users who are asked for.
func (h *history) answer(asked mautrix.ReqQueryKeys) (answer object, observed []observation) {
	devices, masters, selfSigning := object{}, object{}, object{}
	for u, p := range h.cast.users {
		s := h.server[u]
		if _, wanted := asked.DeviceKeys[p.userID]; !wanted || s.away {
			continue
		}
		ofUser := object{}
		seen := observation{user: u, living: make(map[int]copyOf)}
		for d, device := range s.devices {
			if device.gone {
				continue
			}
			visible := device.copyOf.clone()
			if device.stripped {
				visible = copyOf{}.clone()
			}
			ofUser[p.devices[d].deviceID.String()] = p.deviceKeys(d, visible)
			seen.living[d] = visible
		}
		devices[p.userID.String()] = ofUser
		if !s.hidden {
			master := p.masters[s.identity.master]
			seen.identity, seen.hasIdentity, seen.hasSelfSigning = s.identity, true, !s.noSelfSigning
			seen.vouched = s.vouched[s.identity.master]
			object := crossSigningObject(p.userID, id.XSUsageMaster, master.PublicKey())
			if seen.vouched {
				signInto(object, h.cast.bot.userID, h.cast.bot.userSigning.PublicKey().String(), h.cast.bot.userSigning)
			}
			masters[p.userID.String()] = object
			if !s.noSelfSigning {
				key := p.ssk(s.identity)
				object := crossSigningObject(p.userID, id.XSUsageSelfSigning, key.PublicKey())
				signInto(object, p.userID, master.PublicKey().String(), master)
				selfSigning[p.userID.String()] = object
			}
		}
		observed = append(observed, seen)
	}
	if _, wanted := asked.DeviceKeys[h.cast.bot.userID]; wanted {
		devices[h.cast.bot.userID.String()] = object{}
	}
	return object{"device_keys": devices, "master_keys": masters, "self_signing_keys": selfSigning, "failures": object{}}, observed
}

// historyDatabase is shared by all histories; each begins with empty tables.
var historyDatabase *dbutil.Database

func openHistoryDatabase(t *testing.T) *dbutil.Database {
	if historyDatabase == nil {
		historyDatabase = must(dbutil.NewWithDialect("file:history?mode=memory&cache=shared&_txlock=immediate", "sqlite3-fk-wal"))
		historyDatabase.RawDB.SetMaxOpenConns(1)
	}
	return historyDatabase
}

func newHistory(t *testing.T, rt *rapid.T) *history {
	h := &history{
		t: rt, ctx: context.Background(), clock: &manualClock{now: time.UnixMilli(1_700_000_000_000)}, cast: theCast(),
		model: newModel(), pins: make(map[id.UserID]id.Ed25519), db: openHistoryDatabase(t),
	}
	for range h.cast.users {
		h.server = append(h.server, &shown{vouched: make(map[int]bool), devices: make(map[int]*shownDevice)})
	}
	h.install()
	for _, table := range []string{
		"crypto_account", "crypto_megolm_inbound_session", "crypto_device", "crypto_tracked_user", "crypto_cross_signing_keys",
		"crypto_cross_signing_signatures", "sendertrust_claim", "sendertrust_sender", "sendertrust_identity", "sendertrust_device", "sendertrust_signature",
		"sendertrust_withdrawal", "sendertrust_inbox",
	} {
		if _, err := h.db.Exec(h.ctx, "DELETE FROM "+table); err != nil {
			rt.Fatal(err)
		}
	}
	h.install()
	return h
}

// install begins a process.
func (h *history) install() {
	h.client = must(mautrix.NewClient("http://server.test", h.cast.bot.userID, "token"))
	h.client.DeviceID, h.client.Log = "BOTDEVICE", zerolog.Nop()
	h.client.Client = &http.Client{Transport: h}
	h.options = Options{DB: h.db, PickleKey: []byte("pickle"), Clock: h.clock.Now, VerifiedUsers: h.pins}
	h.hook = must(Install(h.ctx, h.client, h.options))
	h.hook.mach.CrossSigningKeys = &crypto.CrossSigningKeysCache{
		MasterKey: h.cast.bot.master, SelfSigningKey: h.cast.bot.selfSigning, UserSigningKey: h.cast.bot.userSigning,
	}
	h.check(h.hook.prepare(h.ctx))
	// So that the device is not one that the server would have to be asked about.
	h.check(h.hook.mach.CryptoStore.PutAccount(h.ctx, h.hook.mach.GetAccount()))
}

func (h *history) check(err error) {
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *history) end() {
	h.hook.mach.Destroy()
	h.check(h.hook.owner.Release())
}

// Draws.

func (h *history) user() (int, *player) {
	u := rapid.IntRange(0, historyUsers-1).Draw(h.t, "user")
	return u, h.cast.users[u]
}
func (h *history) key() keyIndex {
	return keyIndex{rapid.IntRange(0, historyMasters-1).Draw(h.t, "master"), rapid.IntRange(0, historyKeys-1).Draw(h.t, "key")}
}
func (h *history) device() int { return rapid.IntRange(0, historyDevices-1).Draw(h.t, "device") }
func (h *history) session() int {
	return rapid.IntRange(0, historySessions-1).Draw(h.t, "session")
}
func (h *history) flag(name string) bool {
	return rapid.Bool().Draw(h.t, name)
}

// settle lets everything be judged that was learnt; nobody is asked.
func (h *history) settle() {
	_, err := h.hook.resolver.judgeAnswered(h.ctx)
	h.check(err)
}

// actions are what may happen in a history.
func (h *history) actions() map[string]func(*rapid.T) {
	act := func(f func()) func(*rapid.T) {
		return func(t *rapid.T) {
			h.t = t
			h.steps++
			f()
			h.settle()
		}
	}
	return map[string]func(*rapid.T){
		"device appears": act(func() {
			u, _ := h.user()
			d := h.device()
			if device := h.server[u].devices[d]; device != nil {
				device.gone = false
			} else {
				h.server[u].devices[d] = &shownDevice{copyOf: copyOf{}.clone()}
			}
		}),
		"device is deleted": act(func() {
			u, _ := h.user()
			if device := h.server[u].devices[h.device()]; device != nil {
				device.gone = true
			}
		}),
		"device is signed": act(func() {
			u, _ := h.user()
			if device := h.server[u].devices[h.device()]; device != nil {
				device.signed[h.server[u].identity] = true
				delete(device.forged, h.server[u].identity)
			}
		}),
		"signatures are left out": act(func() {
			u, _ := h.user()
			if device := h.server[u].devices[h.device()]; device != nil {
				device.stripped = h.flag("stripped")
			}
		}),
		"server forges a signature": act(func() {
			u, _ := h.user()
			if device := h.server[u].devices[h.device()]; device != nil && rapid.IntRange(0, 3).Draw(h.t, "rarely") == 0 {
				k := h.key()
				device.forged[k] = true
				delete(device.signed, k)
			}
		}),
		"identity is replaced or rotated": act(func() {
			u, _ := h.user()
			h.server[u].identity = h.key()
			if h.flag("devices are signed again") {
				for _, device := range h.server[u].devices {
					device.signed[h.server[u].identity] = true
					delete(device.forged, h.server[u].identity)
				}
			}
		}),
		"server shows or hides": act(func() {
			u, _ := h.user()
			s := h.server[u]
			s.away, s.hidden, s.noSelfSigning = h.flag("away"), h.flag("hidden"), h.flag("no self-signing key")
			if h.flag("all is shown") {
				s.away, s.hidden, s.noSelfSigning = false, false, false
			}
		}),
		"another device of ours verifies": act(func() {
			u, _ := h.user()
			h.server[u].vouched[h.server[u].identity.master] = true
		}),
		"verify": act(h.verify),
		"withdraw": act(func() {
			u, p := h.user()
			err := h.hook.WithdrawVerification(h.ctx, p.userID)
			if want := h.model.withdraw(u, h.pinOf(u) != ""); (err == nil) != want {
				h.t.Fatalf("withdraw: error %v, expected success: %v", err, want)
			}
		}),
		"restart": act(func() {
			for u, p := range h.cast.users {
				if !h.flag("pins change") {
					continue
				}
				delete(h.pins, p.userID)
				if h.flag("pinned") {
					h.pins[p.userID] = p.masters[rapid.IntRange(0, historyMasters-1).Draw(h.t, "pin of "+strconv.Itoa(u))].PublicKey()
				}
			}
			h.end()
			h.install()
			h.model.restart(h.pinned())
		}),
		"somebody asks": act(func() {
			_, p := h.user()
			_, _ = h.hook.mach.FetchKeys(h.ctx, []id.UserID{p.userID}, true)
		}),
		"device list changes": act(func() {
			_, p := h.user()
			h.hook.resolver.ask(p.userID)
			h.pass()
		}),
		"resolver works": act(h.pass),
		"server goes down or up": act(func() {
			h.down = h.flag("down") && h.flag("really")
		}),
		"time passes": act(func() {
			h.clock.advance(time.Duration(rapid.IntRange(1, 7200).Draw(h.t, "seconds")) * time.Second)
		}),
		"room key":      act(func() { h.deliver(h.drawKey()) }),
		"two room keys": act(func() { h.deliver(h.drawKey(), h.drawKey()) }),
		"room key while somebody asks": act(func() {
			key := h.drawKey()
			h.meanwhile = func() { h.deliver(key) }
			_, _ = h.hook.mach.FetchKeys(h.ctx, []id.UserID{h.cast.users[key.from.user].userID}, true)
			h.meanwhile = nil
		}),
		"somebody asks before a room key is stored": act(func() {
			key := h.drawKey()
			h.deliverAfter(func() {
				_, _ = h.hook.mach.FetchKeys(h.ctx, []id.UserID{h.cast.users[key.from.user].userID}, true)
			}, key)
		}),
		"somebody is verified before a room key is stored": act(func() {
			key := h.drawKey()
			h.deliverAfter(h.verify, key)
		}),
		"room key while the resolver works": act(func() {
			key := h.drawKey()
			h.meanwhile = func() { h.deliver(key) }
			h.pass()
			h.meanwhile = nil
		}),
		"room key that somebody exported": act(func() {
			u, _ := h.user()
			d, s := h.device(), h.session()
			source := rapid.SampledFrom([]id.KeySource{id.KeySourceBackup, id.KeySourceForward, id.KeySourceImport, keySourceBundle}).Draw(h.t, "source")
			h.imported(u, d, s, source)
		}),
		"": func(t *rapid.T) {
			h.t = t
			h.compare()
		},
	}
}

func (h *history) pinOf(u int) id.Ed25519 { return h.pins[h.cast.users[u].userID] }

func (h *history) pinned() map[int]int {
	pins := make(map[int]int)
	for u, p := range h.cast.users {
		for m, master := range p.masters {
			if h.pins[p.userID] == master.PublicKey() {
				pins[u] = m
			}
		}
	}
	return pins
}

func (h *history) verify() {
	u, p := h.user()
	m := h.key().master
	err := h.hook.Verify(h.ctx, p.userID, p.masters[m].PublicKey())
	if want := h.model.verify(u, m, h.pinOf(u) != ""); (err == nil) != want {
		h.t.Fatalf("verify: error %v, expected success: %v", err, want)
	}
}

func (h *history) pass() {
	if _, err := h.hook.resolver.pass(h.ctx); err != nil {
		h.t.Fatal(err)
	}
	h.model.signPins(h.vouchedByPin)
}

// vouchedByPin says that the resolver has signed the pinned master key by now.
func (h *history) vouchedByPin(u int) bool {
	identity := must(h.hook.store.identity(h.ctx, h.cast.users[u].userID))
	return identity != nil && identity.VerifiedBy != ""
}

// roomKey is an m.room_key that a device may send us.
type roomKey struct {
	session int
	from    modelDevice
	// embedded is the copy of the device's keys in the Olm message, if there is one.
	embedded *copyOf
}

func (h *history) drawKey() roomKey {
	u, _ := h.user()
	d := h.device()
	var embedded *copyOf
	switch rapid.IntRange(0, 5).Draw(h.t, "embedded") {
	case 0:
	case 1:
		bare := copyOf{}.clone()
		embedded = &bare
	case 2:
		old := copyOf{}.clone()
		old.signed[h.key()] = true
		embedded = &old
	case 3:
		if rapid.IntRange(0, 3).Draw(h.t, "rarely") == 0 {
			forged := copyOf{}.clone()
			forged.forged[h.key()] = true
			embedded = &forged
		}
	default:
		if shown := h.server[u].devices[d]; shown != nil {
			current := shown.copyOf.clone()
			clear(current.forged)
			embedded = &current
		}
	}
	return roomKey{h.session(), modelDevice{u, d}, embedded}
}

// deliver has keys come to us, by one /sync.
func (h *history) deliver(keys ...roomKey) {
	h.deliverAfter(func() {}, keys...)
}

// deliverAfter has keys come by one /sync, and something happen before it is stored. A key counts from when it is stored.
func (h *history) deliverAfter(happen func(), keys ...roomKey) {
	together := newReceiving(h.hook)
	for _, key := range keys {
		h.receive(key, together)
	}
	happen()
	for _, key := range keys {
		h.model.direct(key.session, key.from, key.embedded)
	}
	h.check(h.hook.commit(h.ctx))
	h.hook.unlockKept(true)
	h.hook.tellCommitted()
}

func (h *history) receive(key roomKey, together *receiving) {
	p := h.cast.users[key.from.user]
	device, session := p.devices[key.from.device], h.cast.sessions[key.session]
	olmEvent := &crypto.DecryptedOlmEvent{
		Sender: p.userID, SenderKey: device.senderKey(), Keys: crypto.OlmEventKeys{Ed25519: device.signingKey()},
		Type: event.ToDeviceRoomKey, Content: event.Content{VeryRaw: rawJSON(session.roomKey())},
	}
	if key.embedded != nil {
		olmEvent.SenderDeviceKeys = new(mautrix.DeviceKeys)
		h.check(json.Unmarshal(rawJSON(p.deviceKeys(key.from.device, *key.embedded)), olmEvent.SenderDeviceKeys))
	}
	h.check(h.hook.receiveRoomKey(together.context(h.ctx), olmEvent))
}

// imported has a session come in another way than from the device that made it.
func (h *history) imported(u, d, s int, source id.KeySource) {
	device, session := h.cast.users[u].devices[d], h.cast.sessions[s]
	inbound := must(olm.NewInboundGroupSession([]byte(session.key)))
	imported := &crypto.InboundGroupSession{
		Internal: must(olm.InboundGroupSessionImport(must(inbound.Export(0)))), SigningKey: device.signingKey(), SenderKey: device.senderKey(),
		RoomID: trustRoom, KeySource: source, ReceivedAt: h.clock.Now().UTC(),
	}
	h.model.imported(s, modelDevice{u, d})
	h.check(h.hook.importSession(h.ctx, imported, new(ImportResult)))
}

// compare sees that what is stored, and the verdict on a message of each session, are the model's.
func (h *history) compare() {
	anchor := h.hook.anchor()
	for s, session := range h.cast.sessions {
		stored := must(h.hook.store.claims(h.ctx, session.id()))
		if want := h.model.claims(s); len(stored) != len(want) {
			h.t.Fatalf("session %d: %d claims, want %d", s, len(stored), len(want))
		}
		for _, row := range stored {
			u, d := h.find(row.SenderKey)
			want := h.model.claim(s, modelDevice{u, d})
			if want == nil {
				h.t.Fatalf("session %d: a claim of device %d of user %d that never came", s, d, u)
			}
			h.compareClaim(s, u, d, row, want)
		}
		for u, p := range h.cast.users {
			living := livingClaims(stored)
			if len(stored) == 0 {
				continue
			}
			var identity *Identity
			if living[0].Sender != "" {
				identity = must(h.hook.store.identity(h.ctx, living[0].Sender))
			}
			got := anchor.verdict(p.userID, session.id(), living, identity)
			if want := h.model.verdict(s, u, h.owner(living[0])); got.Code != want {
				h.t.Fatalf("session %d, sent by user %d: %s, want %s", s, u, got.Code, want)
			}
		}
	}
}

// owner gives whose claim it is.
func (h *history) owner(row *SenderData) modelDevice {
	u, d := h.find(row.SenderKey)
	return modelDevice{u, d}
}

func (h *history) find(senderKey id.SenderKey) (u, d int) {
	for u, p := range h.cast.users {
		for d, device := range p.devices {
			if device.senderKey() == senderKey {
				return u, d
			}
		}
	}
	h.t.Fatalf("nobody has the key %s", senderKey)
	return 0, 0
}

func (h *history) compareClaim(s, u, d int, row *SenderData, want *modelClaim) {
	where := fmt.Sprintf("session %d of device %d of user %d", s, d, u)
	if row.State != want.state {
		h.t.Fatalf("%s: %s, want %s", where, row.State, want.state)
	}
	var masterKey id.Ed25519
	if want.master >= 0 {
		masterKey = h.cast.users[u].masters[want.master].PublicKey()
	}
	if row.MasterKey != masterKey {
		h.t.Fatalf("%s: proven by another master key than number %d", where, want.master)
	}
	if row.Legacy != !want.isDirect || (row.Source == SourceDirect) != want.isDirect {
		h.t.Fatalf("%s: source %s, legacy %v", where, row.Source, row.Legacy)
	}
	waits := want.isDirect && (row.State == StateUnknownDevice && row.Reason == "" || row.State == StateDeviceInfo)
	if waits && row.NextRetry.IsZero() && row.RetryCount <= maxRetries {
		h.t.Fatalf("%s: nothing is scheduled after %d tries", where, row.RetryCount)
	}
	if !waits && !row.NextRetry.IsZero() {
		h.t.Fatalf("%s is %s, and a retry is scheduled", where, row.State)
	}
}

func TestHistoryIsJudgedAsByItsReader(t *testing.T) {
	sqliteOnly(t)
	steps := 0
	defer func() { t.Logf("%d steps", steps) }()
	rapid.Check(t, func(rt *rapid.T) {
		h := newHistory(t, rt)
		defer h.end()
		rt.Repeat(h.actions())
		steps += h.steps
	})
}
