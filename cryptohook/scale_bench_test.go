package cryptohook

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"
)

// What it takes to work with many sessions. Targets: a start with 100,000 sessions and judging 10,000 anew take less than a second each,
// and the database has at most 1.5 times the size of mautrix's own.
//
//	go test -tags goolm -run '^$' -bench Scale -benchtime 5x ./cryptohook
//	TEST_DATABASE=postgres go test -tags goolm -run '^$' -bench Scale -benchtime 5x ./cryptohook

const (
	scaleSessions = 100_000
	// scaleUsers share the sessions evenly, each with as many devices.
	scaleUsers   = 1000
	scaleDevices = 2
	// crowdedSessions are those of one user.
	crowdedSessions = 10_000
	crowdedDevices  = 5
	// scaleKeys is how long device keys are, with a display name and two signatures.
	scaleKeys = 1200
)

// scaleWorld is a receiver whose tables are filled without receiving anything.
type scaleWorld struct {
	*receiver
	b      *testing.B
	ctx    context.Context
	path   string
	bot    *actor
	people *keyServer
	// session is a row of mautrix's table by its columns, to be copied.
	columns []string
	session []any
}

func newScaleWorld(b *testing.B) *scaleWorld {
	b.Helper()
	w := &scaleWorld{
		b: b, ctx: context.Background(), path: newDatabase(b), bot: newActor(receiverUser),
		people: &keyServer{actors: make(map[id.UserID]*actor), requests: make(map[string]int)},
	}
	w.people.add(w.bot)
	w.open()
	b.Cleanup(func() { w.close() })
	own := w.mach.GetAccount()
	w.bot.devices = []*actorDevice{{owner: w.bot, deviceID: receiverDevice, account: own, crossSigned: true}}
	w.must(w.mach.CryptoStore.PutAccount(w.ctx, own))
	w.must(w.prepare(w.ctx))
	w.fetch(receiverUser)
	w.template()
	return w
}

func (w *scaleWorld) must(err error) {
	w.b.Helper()
	if err != nil {
		w.b.Fatal(err)
	}
}

func (w *scaleWorld) open() {
	w.b.Helper()
	net := &network{people: w.people, claimed: make(map[id.UserID]int), requests: make(map[string]int)}
	var err error
	w.receiver, err = openReceiver(w.ctx, safeDriver, w.path, 5, net, w.bot, zerolog.Nop())
	w.must(err)
}

func (w *scaleWorld) fetch(userID id.UserID) {
	w.b.Helper()
	_, err := w.mach.FetchKeys(w.ctx, []id.UserID{userID}, true)
	w.must(err)
	_, err = w.resolver.judgeAnswered(w.ctx)
	w.must(err)
}

// template has mautrix store one session, and reads the row.
func (w *scaleWorld) template() {
	w.b.Helper()
	maker := crypto.NewOlmAccount()
	session := must(crypto.NewInboundGroupSession(maker.IdentityKey(), maker.SigningKey(), storyRoom, newMegolm(storyRoom).key, 7*24*time.Hour, 100, nil, false))
	w.must(w.uow.SQLCryptoStore.PutGroupSession(w.ctx, session))
	rows := must(w.db.Query(w.ctx, "SELECT * FROM crypto_megolm_inbound_session"))
	defer rows.Close()
	w.columns = must(rows.Columns())
	w.session = make([]any, len(w.columns))
	pointers := make([]any, len(w.columns))
	for i := range pointers {
		pointers[i] = &w.session[i]
	}
	rows.Next()
	w.must(rows.Scan(pointers...))
	w.must(rows.Close())
	w.exec("DELETE FROM crypto_megolm_inbound_session")
}

func (w *scaleWorld) exec(query string, args ...any) {
	w.b.Helper()
	_, err := w.db.Exec(w.ctx, query, args...)
	w.must(err)
}

// person is somebody whose sessions are stored.
type person struct {
	*actor
	published []json.RawMessage
}

// newPerson makes somebody whom the server knows. The keys of the devices have a realistic length.
func (w *scaleWorld) newPerson(userID id.UserID, devices int, crossSigned bool) *person {
	p := &person{actor: w.people.add(newActor(userID))}
	for i := range devices {
		d := p.addDevice(id.DeviceID(fmt.Sprintf("DEVICE%04d", i)))
		d.crossSigned = crossSigned
		keys := d.keys()
		keys["unsigned"] = object{"device_display_name": ""}
		keys["unsigned"] = object{"device_display_name": strings.Repeat("x", max(0, scaleKeys-len(rawJSON(keys))))}
		p.published = append(p.published, rawJSON(keys))
	}
	return p
}

func randomSessionID() id.SessionID {
	raw := make([]byte, 32)
	_, _ = rand.Read(raw)
	return id.SessionID(base64.RawStdEncoding.EncodeToString(raw))
}

// claimsOf makes claims on new sessions of a person, all in one state.
func (p *person) claimsOf(count int, state State) []*SenderData {
	claims := make([]*SenderData, count)
	for i := range claims {
		device := p.devices[i%len(p.devices)]
		c := &SenderData{
			SessionID: randomSessionID(), RoomID: id.RoomID(fmt.Sprintf("!%018d:example.org", i%50)), SenderKey: device.senderKey(), SigningKey: device.signingKey(),
			Sender: p.userID, Source: SourceDirect, State: state, ReceivedAt: time.Now(), UpdatedAt: time.Now(),
		}
		switch state {
		case StateDeviceInfo:
			c.DeviceID, c.RetryCount, c.NextRetry = device.deviceID, 3, time.Now().Add(time.Hour)
			if i%20 == 0 { // as if they named a signer who has not signed them
				c.DeviceKeys = p.published[i%len(p.devices)]
			}
		case StateUnknownDevice:
			c.RetryCount, c.NextRetry = maxRetries, time.Now().Add(time.Hour)
		default:
			c.DeviceID, c.MasterKey = device.deviceID, p.masterKey()
		}
		claims[i] = c
	}
	return claims
}

// storeHeld stores the sessions of the claims as mautrix does.
func (w *scaleWorld) storeHeld(claims []*SenderData) {
	w.b.Helper()
	const perStatement = 200
	w.must(w.db.DoTxn(w.ctx, nil, func(ctx context.Context) error {
		for len(claims) > 0 {
			chunk := claims[:min(perStatement, len(claims))]
			claims = claims[len(chunk):]
			var values []string
			var params []any
			for _, claim := range chunk {
				own := map[string]any{
					"session_id": claim.SessionID, "sender_key": claim.SenderKey, "signing_key": claim.SigningKey, "room_id": claim.RoomID, "source_user": claim.Sender,
				}
				var places []string
				for i, column := range w.columns {
					value := w.session[i]
					if replaced, ok := own[column]; ok {
						value = replaced
					}
					params = append(params, value)
					places = append(places, fmt.Sprintf("$%d", len(params)))
				}
				values = append(values, "("+strings.Join(places, ", ")+")")
			}
			query := "INSERT INTO crypto_megolm_inbound_session (" + strings.Join(w.columns, ", ") + ") VALUES " + strings.Join(values, ", ")
			if _, err := w.db.Exec(ctx, query, params...); err != nil {
				return err
			}
		}
		return nil
	}))
}

func (w *scaleWorld) storeClaims(claims []*SenderData) {
	w.b.Helper()
	w.must(w.store.write(w.ctx, func(ctx context.Context) error { return w.store.putClaims(ctx, claims) }))
}

// fill stores the sessions of many people, as mautrix alone has them, and gives their claims: 60 % unverified, 25 % verified, 10 % of
// devices that are not cross-signed, 5 % of unknown ones. learn stores what is known of the people.
func (w *scaleWorld) fill() (claims []*SenderData, learn func()) {
	w.b.Helper()
	var people []*person
	for i := range scaleUsers {
		state := StateSenderUnverified
		switch percent := i % 20; {
		case percent < 5:
			state = StateSenderVerified
		case percent < 7:
			state = StateDeviceInfo
		case percent < 8:
			state = StateUnknownDevice
		}
		p := w.newPerson(id.UserID(fmt.Sprintf("@somebody%d:example.org", i)), scaleDevices, state != StateDeviceInfo)
		people = append(people, p)
		claims = append(claims, p.claimsOf(scaleSessions/scaleUsers, state)...)
		if state == StateSenderVerified {
			p.verifiedBy = w.bot
		}
		for _, device := range p.devices {
			w.must(w.uow.PutDevice(w.ctx, p.userID, &id.Device{UserID: p.userID, DeviceID: device.deviceID, IdentityKey: device.senderKey(), SigningKey: device.signingKey()}))
		}
	}
	w.storeHeld(claims)
	return claims, func() {
		w.must(w.store.write(w.ctx, func(ctx context.Context) error {
			for _, p := range people {
				identity := &Identity{UserID: p.userID, MasterKey: p.masterKey(), FirstMasterKey: p.masterKey(), SelfSigningKey: p.selfSigningKey()}
				if p.verifiedBy != nil {
					identity.VerifiedBy, identity.WasVerified = w.bot.userSigning.PublicKey(), true
				}
				if err := w.store.putIdentity(ctx, identity, time.Now()); err != nil {
					return err
				}
				for i, device := range p.devices {
					if err := w.store.putDevices(ctx, []*publishedDevice{{
						userID: p.userID, deviceID: device.deviceID, identityKey: device.senderKey(), signingKey: device.signingKey(), raw: p.published[i],
					}}); err != nil {
						return err
					}
					if _, err := w.store.putSignature(ctx, signature{p.userID, device.senderKey(), device.signingKey(), p.selfSigningKey()}, p.published[i]); err != nil {
						return err
					}
				}
			}
			return nil
		}))
		w.storeClaims(claims)
	}
}

// size gives how many bytes the database takes, at its densest.
func (w *scaleWorld) size() (bytes int) {
	w.b.Helper()
	if w.db.Dialect == dbutil.Postgres {
		w.exec("VACUUM FULL")
		return w.count(`SELECT SUM(pg_total_relation_size(oid)) FROM pg_class WHERE relkind='r' AND relnamespace='public'::regnamespace`)
	}
	w.exec("VACUUM")
	w.exec("PRAGMA wal_checkpoint(TRUNCATE)")
	return w.count("PRAGMA page_count") * w.count("PRAGMA page_size")
}

func BenchmarkScaleSize(b *testing.B) {
	for range b.N {
		w := newScaleWorld(b)
		empty := w.size()
		_, learn := w.fill()
		mautrix := w.size()
		learn()
		whole := w.size()
		b.ReportMetric(float64(whole)/float64(mautrix), "size/mautrix")
		b.ReportMetric(float64(mautrix-empty)/scaleSessions, "B/session-mautrix")
		b.ReportMetric(float64(whole-mautrix)/scaleSessions, "B/session-ours")
	}
}

func BenchmarkScaleStart(b *testing.B) {
	w := newScaleWorld(b)
	_, learn := w.fill()
	learn()
	w.close()
	b.ResetTimer()
	for range b.N {
		w.open()
		w.must(w.prepare(w.ctx))
		w.must(w.resolver.begin(w.ctx))
		must(w.inbox.load(w.ctx, 0))
		b.StopTimer()
		if _, done, err := w.store.migration(w.ctx); err != nil || !done {
			b.Fatal("the migration is not a part of it")
		}
		w.close()
		b.StartTimer()
	}
	b.StopTimer()
	w.open()
}

// BenchmarkScaleMigrate gives every session that mautrix has stored before the hook its claim.
func BenchmarkScaleMigrate(b *testing.B) {
	w := newScaleWorld(b)
	w.fill()
	b.ResetTimer()
	for range b.N {
		b.StopTimer()
		w.exec("DELETE FROM sendertrust_claim")
		w.exec("DELETE FROM sendertrust_migration")
		b.StartTimer()
		w.must(w.migrate(w.ctx))
	}
	b.StopTimer()
	if migrated := w.count("SELECT COUNT(*) FROM sendertrust_session"); migrated != scaleSessions {
		b.Errorf("%d sessions were migrated", migrated)
	}
}

// BenchmarkScaleJudge judges one user's sessions anew after one answer to a key query, among those of all others.
func BenchmarkScaleJudge(b *testing.B) {
	w := newScaleWorld(b)
	_, learn := w.fill()
	learn()
	for _, story := range []struct {
		name             string
		signed, verified bool
		before, after    State
		change           func(p *person)
	}{
		{name: "reset", signed: true, verified: true, before: StateSenderVerified, after: StateVerificationViolation, change: func(p *person) { p.reset() }},
		{name: "verified", signed: true, before: StateSenderUnverified, after: StateSenderVerified, change: func(p *person) { p.verifiedBy = w.bot }},
		{name: "rotated", signed: true, before: StateSenderUnverified, after: StateDeviceInfo, change: func(p *person) {
			// The devices are not signed by the new key.
			p.selfSigning = newActor("").selfSigning
			for _, device := range p.devices {
				device.crossSigned = false
			}
		}},
		{name: "cross-signed", before: StateDeviceInfo, after: StateSenderUnverified, change: func(p *person) {
			for _, device := range p.devices {
				device.crossSigned = true
			}
		}},
	} {
		b.Run(story.name, func(b *testing.B) {
			w.b = b
			for n := range b.N {
				b.StopTimer()
				p := w.newPerson(id.UserID(fmt.Sprintf("@crowded-%s-%d-%d:example.org", story.name, b.N, n)), crowdedDevices, story.signed)
				if story.verified {
					p.verifiedBy = w.bot
				}
				w.fetch(p.userID)
				w.storeClaims(p.claimsOf(crowdedSessions, story.before))
				story.change(p)
				b.StartTimer()
				w.fetch(p.userID)
				b.StopTimer()
				if judged := w.count("SELECT COUNT(*) FROM sendertrust_session WHERE sender=$1 AND state=$2", p.userID, story.after); judged != crowdedSessions {
					b.Fatalf("%d sessions are %s", judged, story.after)
				}
				w.exec("DELETE FROM sendertrust_claim WHERE sender_id IN (SELECT id FROM sendertrust_sender WHERE user_id=$1)", p.userID)
				b.StartTimer()
			}
		})
	}
	w.b = b
}
