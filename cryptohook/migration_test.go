package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// legacyWorld is a world whose database was used by mautrix as it is, before the hook came.
type legacyWorld struct {
	*trustWorld
	published, deleted, unsigned *actorDevice
	// received came from these devices, in this order; imported, own and redacted are what they say.
	fromPublished, fromDeleted, fromUnsigned, nameless []*megolm
	imported                                           []*megolm
	own                                                id.SessionID
	redacted                                           *megolm
}

// newLegacyWorld lets a stock OlmMachine receive Olm messages with room keys, share a session of its own, and import others.
func newLegacyWorld(t *testing.T, sessions int) *legacyWorld {
	t.Helper()
	w := &legacyWorld{trustWorld: newTrustWorld(t)}
	w.published = w.server.add(newActor("@alice:test")).addDevice("ALICE")
	w.unsigned = w.server.add(newActor("@bob:test")).addDevice("BOB")
	w.unsigned.crossSigned = false
	w.deleted = w.server.add(newActor("@carol:test")).addDevice("CAROL")
	w.deleted.unpublished = true
	var keys []object
	share := func(from *actorDevice, count int) (made []*megolm) {
		for range count {
			session := newMegolm(trustRoom)
			made = append(made, session)
			keys = append(keys, w.share(from, session, withoutDeviceKeys))
		}
		return made
	}
	w.fromPublished, w.fromDeleted, w.fromUnsigned = share(w.published, sessions), share(w.deleted, sessions), share(w.unsigned, sessions)
	w.nameless = share(w.published, 1)
	w.redacted = share(w.published, 1)[0]

	client := must(mautrix.NewClient("http://server.test", w.bot.userID, "token"))
	client.DeviceID, client.Log, client.Client = w.client.DeviceID, w.client.Log, &http.Client{Transport: w.server}
	store := crypto.NewSQLCryptoStore(w.db, nil, w.bot.userID.String(), w.client.DeviceID, w.options.PickleKey)
	stock := crypto.NewOlmMachine(client, &client.Log, store, w.client.StateStore.(crypto.StateStore))
	if err := stock.Load(w.ctx); err != nil {
		t.Fatal(err)
	}
	defer stock.Destroy()
	for _, key := range keys {
		var evt event.Event
		if err := evt.UnmarshalJSON(rawJSON(key)); err != nil {
			t.Fatal(err)
		}
		evt.Type.Class = event.ToDeviceEventType
		if err := evt.Content.ParseRaw(evt.Type); err != nil {
			t.Fatal(err)
		}
		stock.HandleEncryptedEvent(w.ctx, &evt)
	}
	for range sessions {
		session := newMegolm(trustRoom)
		w.imported = append(w.imported, session)
		_, err := stock.ImportRoomKeyFromBackup(w.ctx, "1", trustRoom, session.id(), &backup.MegolmSessionData{
			Algorithm: id.AlgorithmMegolmV1, SenderKey: w.published.senderKey(), SessionKey: string(exportOf(t, session.key, 0)),
			SenderClaimedKeys: backup.SenderClaimedKeys{Ed25519: w.published.signingKey()},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := stock.ShareGroupSession(w.ctx, trustRoom, nil); err != nil {
		t.Fatal(err)
	}
	w.own = must(store.GetOutboundGroupSession(w.ctx, trustRoom)).ID()
	if err := store.RedactGroupSession(w.ctx, trustRoom, w.redacted.id(), "expired"); err != nil {
		t.Fatal(err)
	}
	for _, statement := range []string{
		// mautrix before 0.31 did not note who sent a key.
		"UPDATE crypto_megolm_inbound_session SET source_user='' WHERE session_id='" + w.nameless[0].id().String() + "'",
		"DELETE FROM crypto_device WHERE user_id='@alice:test'",
		// mautrix's crypto helper gives the account no name.
		"UPDATE crypto_account SET account_id=''",
		"UPDATE crypto_olm_session SET account_id=''",
		"UPDATE crypto_megolm_inbound_session SET account_id=''",
		"UPDATE crypto_megolm_outbound_session SET account_id=''",
	} {
		if _, err := w.db.Exec(w.ctx, statement); err != nil {
			t.Fatal(err)
		}
	}
	if rows := w.countRows("true"); rows != 0 {
		t.Fatalf("the hook has seen %d sessions already", rows)
	}
	w.restart()
	// The hook of before has seen that there was nothing to do.
	if _, err := w.db.Exec(w.ctx, "DELETE FROM sendertrust_migration"); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *legacyWorld) migrateAll() {
	w.t.Helper()
	if err := w.hook.migrate(w.ctx); err != nil {
		w.t.Fatal(err)
	}
}

// check sees that every session has its one claim, and the right one.
func (w *legacyWorld) check() {
	w.t.Helper()
	want := func(what string, sessions []*megolm, from *actorDevice, state State, source Source, legacy bool, code Code) {
		w.t.Helper()
		for _, session := range sessions {
			if claims := w.claims(session); len(claims) != 1 {
				w.t.Fatalf("%s: %d claims", what, len(claims))
			}
			row := w.row(session, from)
			if row.State != state || row.Source != source || row.Legacy != legacy || !row.NextRetry.IsZero() {
				w.t.Errorf("%s: stored %+v", what, row)
			}
			if w.storedKey(session, trustRoom) == nil {
				w.t.Errorf("%s: the key is lost", what)
			}
		}
		wantCode(w.t, w.judgeNow(w.say(from, sessions[0], what)), code)
	}
	want("a published device's", w.fromPublished, w.published, StateSenderUnverified, SourceDirect, false, CodeUnverifiedIdentity)
	want("an unsigned device's", w.fromUnsigned, w.unsigned, StateDeviceInfo, SourceDirect, true, CodeUnsignedDevice)
	want("a deleted device's", w.fromDeleted, w.deleted, StateUnknownDevice, SourceDirect, true, CodeUnknownDevice)
	want("an imported one", w.imported, w.published, StateUnknownDevice, SourceBackup, true, CodeAuthenticityNotGuaranteed)
	if own := must(w.hook.store.claims(w.ctx, w.own)); len(own) != 1 || own[0].State != StateSenderVerified || own[0].DeviceID != "BOTDEVICE" || own[0].Legacy {
		w.t.Errorf("our own session: %+v", own)
	}
	if claims := w.claims(w.redacted); len(claims) != 0 {
		w.t.Errorf("a session without a key has claims: %+v", claims)
	}
}

func TestSessionsFromBeforeTheHookAreMigratedAndJudged(t *testing.T) {
	w := newLegacyWorld(t, 3)
	w.migrateAll()
	if row := w.row(w.nameless[0], w.published); row.Sender != "" || !row.NextRetry.IsZero() || !row.Legacy {
		t.Errorf("a session whose sender nobody noted: %+v", row)
	}
	if current := must(w.hook.store.deviceListCurrent(w.ctx, "@alice:test")); current {
		t.Error("a device list of which no signature is known counts as up to date")
	}
	queries := w.server.count("keys/query")
	w.resolve()
	if asked := w.server.count("keys/query") - queries; asked != 1 {
		t.Errorf("%d requests for three users", asked)
	}
	w.check()
	w.clock.advance(24 * time.Hour)
	w.resolve()
	if asked := w.server.count("keys/query") - queries; asked != 1 {
		t.Error("sessions of devices that are gone are asked for again and again")
	}
	// The device comes back, or somebody asks: then they are looked at again.
	w.deleted.unpublished = false
	w.know(w.deleted.owner)
	w.wantState(w.fromDeleted[0], w.deleted, StateSenderUnverified)
}

// mautrix's own list of devices says whose a session is that came before mautrix noted it.
func TestSenderOfALegacySessionIsFoundByItsDevice(t *testing.T) {
	w := newLegacyWorld(t, 1)
	_, err := w.db.Exec(w.ctx, `
		INSERT INTO crypto_device (user_id, device_id, identity_key, signing_key, trust, deleted, name)
		VALUES ('@alice:test', 'ALICE', $1, $2, 0, true, '')
	`, w.published.senderKey(), w.published.signingKey())
	if err != nil {
		t.Fatal(err)
	}
	w.migrateAll()
	if row := w.row(w.nameless[0], w.published); row.Sender != "@alice:test" || row.State != StateUnknownDevice {
		t.Errorf("stored %+v", row)
	}
	w.resolve()
	w.wantState(w.nameless[0], w.published, StateSenderUnverified)
}

func TestMigrationLeavesClaimsAlone(t *testing.T) {
	w := newLegacyWorld(t, 1)
	w.migrateAll()
	w.resolve()
	if _, err := w.db.Exec(w.ctx, "DELETE FROM sendertrust_migration"); err != nil {
		t.Fatal(err)
	}
	w.migrateAll()
	if err := w.hook.resolver.begin(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.resolve()
	w.check()
	before := w.row(w.fromPublished[0], w.published)
	w.clock.advance(time.Hour)
	w.migrateAll() // once is enough
	if after := w.row(w.fromPublished[0], w.published); !after.UpdatedAt.Equal(before.UpdatedAt) {
		t.Error("migrated again")
	}
}

// interruptedMigration ends within the second batch, after the first one is stored. It says whether anything is left to do.
func (w *legacyWorld) interruptedMigration() bool {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	looks, clock := 0, w.hook.clock
	defer func() { w.hook.clock = clock }()
	w.hook.clock = func() time.Time {
		if looks++; looks == sessionsPerBatch+sessionsPerBatch/2 {
			cancel()
		}
		return clock()
	}
	err := w.hook.migrate(ctx)
	if err != nil && !errors.Is(err, context.Canceled) {
		w.t.Fatal(err)
	}
	return err != nil
}

// The process ends again and again, in the middle of a batch: the next one goes on after the batches that are done.
func TestInterruptedMigrationGoesOn(t *testing.T) {
	w := newLegacyWorld(t, 1)
	template := must(w.hook.store.Query(w.ctx, "SELECT session FROM crypto_megolm_inbound_session WHERE session IS NOT NULL LIMIT 1"))
	var pickle []byte
	template.Next()
	if err := errors.Join(template.Scan(&pickle), template.Close()); err != nil {
		t.Fatal(err)
	}
	const many = 4*sessionsPerBatch + 17
	err := w.hook.store.write(w.ctx, func(ctx context.Context) error {
		for i := range many {
			_, err := w.hook.store.Exec(ctx, `
				INSERT INTO crypto_megolm_inbound_session (account_id, session_id, sender_key, signing_key, room_id, session, key_source, source_user, received_at)
				VALUES ($1, $2, 'somebody', 'somebody', '!room:test', $3, 'direct', '@somebody:test', $4)
			`, w.hook.uow.AccountID, fmt.Sprintf("session%036d", i), pickle, w.clock.Now())
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	interruptions := 0
	for w.interruptedMigration() {
		interruptions++
	}
	if interruptions != 3 {
		t.Errorf("interrupted %d times", interruptions)
	}
	if rows := w.countRows("sender='@somebody:test'"); rows != many {
		t.Errorf("%d of %d sessions have a claim", rows, many)
	}
}

func TestMigrationIsToldInTheLog(t *testing.T) {
	w := newLegacyWorld(t, 2)
	w.migrateAll()
	log := w.log.String()
	if !strings.Contains(log, "of all sessions from before the hook") || strings.Count(log, `"component":"migration"`) > 5 {
		t.Error("the log does not tell of the migration, or too often")
	}
	fresh := newTrustWorld(t)
	if err := fresh.hook.migrate(fresh.ctx); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(fresh.log.String(), `"component":"migration"`) {
		t.Error("a new database has nothing to migrate")
	}
}
