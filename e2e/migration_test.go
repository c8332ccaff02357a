package e2e

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
	"sendertrust/e2e/stock"
)

// A bot that was written with mautrix becomes ours, on its own database: with sessions that it received, shared and imported. The
// migration of a great many is killed in the middle.
func TestDatabaseOfAMautrixBotIsMigrated(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	const copies = 30_000
	ctx := within(t, 3*patience)
	localpart := must(w.register(ctx, "bot"))(t)
	botID := id.NewUserID(localpart, "localhost")
	dir := must(os.MkdirTemp(w.dir, "bot-"))(t)
	database := filepath.Join(dir, "sendertrust.db")

	alice, alicesKey := w.newStranger(t, "alice")
	carol, _ := w.newStranger(t, "carol")
	bob, dave := w.newPerson(t, "bob"), w.newPerson(t, "dave")
	mautrixBot := must(stock.Login(ctx, w.server.URL, localpart, password, database))(t)
	room := must(alice.CreateRoom(ctx, true, botID, bob.UserID, carol.UserID, dave.UserID))(t)
	ok(t, mautrixBot.Join(ctx, room))
	for _, guest := range []*people.Person{bob, carol, dave} {
		ok(t, guest.Join(ctx, room))
		ok(t, guest.WaitJoined(ctx, room, botID))
	}
	sessions := make(map[*people.Person]id.SessionID)
	for _, person := range []*people.Person{alice, bob, carol} {
		ok(t, person.WaitJoined(ctx, room, botID))
		must(mautrixBot.Trust(ctx, must(person.Send(ctx, room, say("to the bot that was")))(t)))(t)
		sessions[person] = sessionID(t, person, room)
	}
	unshared := must(dave.NewSession(room))(t)
	ok(t, mautrixBot.ImportKeys(ctx, "passphrase", exported(t, dave, unshared)))
	ok(t, mautrixBot.Send(ctx, room, say("from the bot that was")))
	own := must(mautrixBot.OwnSession(ctx, room))(t)
	ok(t, mautrixBot.Close())
	ok(t, carol.Logout(ctx))

	db := must(dbutil.NewWithDialect("file:"+database+"?_txlock=immediate", "sqlite3-fk-wal"))(t)
	t.Cleanup(func() { _ = db.Close() })
	copySessions(ctx, t, db, sessions[alice], copies)
	bot := must(botproc.Start(ctx, botproc.Options{
		Binary: w.binary, Homeserver: w.server.URL, UserID: botID, Password: password, Dir: dir,
		Configure: func(config botproc.Config) {
			config["encryption"] = botproc.Config{"pickle_key": stock.PickleKey, "wait": keyWait.String()}
		},
	}))(t)
	t.Cleanup(func() {
		bot.Kill()
		if t.Failed() {
			t.Log(bot.Tail(40))
		}
		if err := bot.CheckLog(mark, password); err != nil {
			t.Error(err)
		}
	})
	for count(ctx, t, db, "true") == 0 {
		continue
	}
	bot.Kill()
	migrated := count(ctx, t, db, "true")
	if migrated >= copies {
		t.Fatal("the migration was not killed in the middle")
	}
	t.Logf("killed after %d of %d sessions", migrated, copies+5)
	ok(t, bot.Restart(ctx))

	expect(t, bot, alice, must(alice.Send(ctx, room, say("on my old session")))(t), unverifiedIdentity(alice, alicesKey, sessions[alice]))
	bobs := unsignedDevice(bob, sessions[bob])
	bobs.Legacy = true
	expect(t, bot, alice, must(bob.Send(ctx, room, say("on my old session")))(t), bobs)
	expect(t, bot, alice, must(dave.SendWith(ctx, unshared, say("on a session that was imported")))(t), people.Annotation{
		Code: "authenticity_not_guaranteed", Shield: "grey", State: "unknown_device", SessionID: unshared.ID, Legacy: true,
	})
	if held, claimed := held(ctx, t, db), count(ctx, t, db, "true"); claimed < held || held < copies+5 {
		t.Errorf("%d sessions, and %d claims", held, claimed)
	}
	for where, want := range map[string]int{
		"state='sender_unverified' AND NOT legacy_session AND sender='" + alice.UserID.String() + "'":            copies + 1,
		"state='device_info' AND legacy_session AND session_id='" + sessions[bob].String() + "'":                 1,
		"state='unknown_device' AND legacy_session AND session_id='" + sessions[carol].String() + "'":            1,
		"state='sender_verified' AND source='direct' AND session_id='" + own.String() + "'":                      1,
		"state='unknown_device' AND source='import' AND session_id='" + unshared.ID.String() + "' AND sender=''": 1,
	} {
		if got := count(ctx, t, db, where); got != want {
			t.Errorf("%d claims with %s, want %d", got, where, want)
		}
	}
}

// exported is a key export with one session.
func exported(t *testing.T, owner *people.Person, session *people.Session) []byte {
	t.Helper()
	inbound := must(crypto.NewInboundGroupSession(owner.SenderKey(), owner.SigningKey(), session.RoomID, session.Key, 0, 0, nil, false))(t)
	return must(crypto.ExportKeys("passphrase", []*crypto.InboundGroupSession{inbound}))(t)
}

// copySessions makes many sessions of one.
func copySessions(ctx context.Context, t *testing.T, db *dbutil.Database, sessionID id.SessionID, copies int) {
	t.Helper()
	_, err := db.Exec(ctx, `
		WITH RECURSIVE copy(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM copy WHERE n<$2)
		INSERT INTO crypto_megolm_inbound_session (account_id, session_id, sender_key, signing_key, room_id, session, key_source, source_user, received_at)
		SELECT account_id, printf('copy%039d', n), sender_key, signing_key, room_id, session, key_source, source_user, received_at
		FROM crypto_megolm_inbound_session, copy WHERE session_id=$1
	`, sessionID, copies)
	ok(t, err)
}

// count counts the claims for which that holds; before the bot has made its tables there are none.
func count(ctx context.Context, t *testing.T, db *dbutil.Database, where string) (claims int) {
	t.Helper()
	if exists := must(db.TableExists(ctx, "sendertrust_claim"))(t); exists {
		ok(t, db.QueryRow(ctx, "SELECT COUNT(*) FROM sendertrust_session WHERE "+where).Scan(&claims))
	}
	return claims
}

func held(ctx context.Context, t *testing.T, db *dbutil.Database) (sessions int) {
	t.Helper()
	ok(t, db.QueryRow(ctx, "SELECT COUNT(*) FROM crypto_megolm_inbound_session WHERE session IS NOT NULL").Scan(&sessions))
	return sessions
}
