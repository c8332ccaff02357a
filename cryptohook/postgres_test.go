package cryptohook

import (
	"context"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
	"maunium.net/go/mautrix/sqlstatestore"
)

// What PostgreSQL is stricter about than SQLite.

func TestPostgreSQLTakesTheTextsThatStrangersSend(t *testing.T) {
	ctx := t.Context()
	db := openPostgres(t, newPostgres(t))
	for text, want := range map[string]string{
		"a\x00b": "a\ufffdb", "a\xffb": "a\ufffdb", "\x00": "\ufffd", `\u0000`: `\u0000`, "plain ☺": "plain ☺", "": "",
	} {
		var got string
		if err := db.QueryRow(ctx, "SELECT $1::text", id.UserID(text)).Scan(&got); err != nil || got != want {
			t.Errorf("%q became %q (%v), want %q", text, got, err, want)
		}
	}
	states := sqlstatestore.NewSQLStateStore(db, nil, false)
	if err := states.SetMember(ctx, "!r", "@a\x00:test", &event.MemberEventContent{Membership: event.MembershipJoin, Displayname: "A\x00"}); err != nil {
		t.Error(err)
	}
	levels := &event.PowerLevelsEventContent{Users: map[id.UserID]int{"@a\x00:test": 50, `@b\u0000:test`: 60}}
	if err := states.SetPowerLevels(ctx, "!r", levels); err != nil {
		t.Error(err)
	}
	if stored := must(states.GetPowerLevels(ctx, "!r")); stored.Users["@a\ufffd:test"] != 50 || stored.Users[`@b\u0000:test`] != 60 {
		t.Errorf("stored %v", stored.Users)
	}
}

func TestEscapedNULIsTakenOutOfJSONAndNothingElseIs(t *testing.T) {
	for text, want := range map[string]string{
		`"\u0000"`: `"\ufffd"`, `"\\u0000"`: `"\\u0000"`, `"\\\u0000\n\u0001"`: `"\\\ufffd\n\u0001"`, `"u0000"`: `"u0000"`, `\`: `\`,
		`"\u0000\u0000x\"\u0000`: `"\ufffd\ufffdx\"\ufffd`, `\u0000\`: `\ufffd\`,
	} {
		if got := withoutEscapedNUL(text); got != want {
			t.Errorf("%s became %s, want %s", text, got, want)
		}
	}
}

// mautrix's columns have no time zone: a time has to come back as the same moment, wherever the bot and the server are.
func TestTimesComeBackAsTheSameMoment(t *testing.T) {
	s, ctx := newStory(t, newPostgres(t), 2), t.Context()
	r := s.open(t, s.seed)
	defer r.close()
	moment := time.UnixMilli(1_700_000_000_000).In(time.FixedZone("somewhere", 5*60*60))
	session := must(crypto.NewInboundGroupSession(s.peers[0].senderKey(), s.peers[0].signingKey(), storyRoom, newMegolm(storyRoom).key, time.Hour, 100, nil, false))
	session.ReceivedAt = moment
	if err := r.uow.SQLCryptoStore.PutGroupSession(ctx, session); err != nil {
		t.Fatal(err)
	}
	if stored := must(r.uow.SQLCryptoStore.GetGroupSession(ctx, storyRoom, session.ID())); !stored.ReceivedAt.Equal(moment) {
		t.Errorf("%v became %v", moment, stored.ReceivedAt)
	}
}

func TestPostgreSQLHasRoomForEveryMessageIndex(t *testing.T) {
	s, ctx := newStory(t, newPostgres(t), 2), t.Context()
	r := s.open(t, s.seed)
	defer r.close()
	indices := []uint{0, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32}
	for _, eventID := range []id.EventID{"$original", "$replay"} {
		for _, index := range indices {
			valid, err := r.uow.ValidateMessageIndex(ctx, "session", eventID, index, 1)
			if err != nil || valid != (eventID == "$original") {
				t.Errorf("%s at %d: valid %t (%v)", eventID, index, valid, err)
			}
		}
		if err := r.uow.flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.count("SELECT COUNT(*) FROM crypto_message_index"); n != len(indices) {
		t.Errorf("%d indices are stored", n)
	}
}

// One thing that cannot be stored must not keep the next ones from being stored, for ever.
func TestWhatPostgreSQLRefusesIsLeftOut(t *testing.T) {
	s, ctx := newStory(t, newPostgres(t), 2), t.Context()
	r := s.open(t, s.seed)
	defer r.close()
	now := time.Now()
	r.uow.stage(func(ctx context.Context) error {
		return r.store.putWithheld(ctx, "before", "@a:test", event.RoomKeyWithheldUnverified, now)
	})
	r.uow.stage(func(ctx context.Context) error {
		// The first of the two is taken back with the second.
		return errors.Join(
			r.store.putWithheld(ctx, "with it", "@a:test", event.RoomKeyWithheldUnverified, now),
			r.store.putWithheld(ctx, id.SessionID(randomText(10_000)), "@a:test", event.RoomKeyWithheldUnverified, now),
		)
	})
	r.uow.stage(func(ctx context.Context) error {
		_, err := r.db.Exec(ctx, `INSERT INTO crypto_message_index (session_id, "index", event_id, timestamp) VALUES ('s', $1, 'e', 1)`, math.MaxInt32+1)
		return err
	})
	r.uow.stage(func(ctx context.Context) error {
		return r.store.putWithheld(ctx, "behind", "@a:test", event.RoomKeyWithheldUnverified, now)
	})
	// Of two Olm sessions one is with a key that does not fit into its column.
	other := crypto.NewOlmAccount()
	if err := other.Internal.GenOneTimeKeys(2); err != nil {
		t.Fatal(err)
	}
	fitting, tooLong := id.SenderKey(strings.Repeat("k", 43)), id.SenderKey(strings.Repeat("l", 44))
	senderKeys := []id.SenderKey{tooLong, fitting}
	for _, oneTimeKey := range must(other.Internal.OneTimeKeys()) {
		session := must(crypto.NewOlmAccount().Internal.NewOutboundSession(other.IdentityKey(), oneTimeKey))
		if err := r.uow.AddSession(ctx, senderKeys[0], &crypto.OlmSession{Internal: session}); err != nil {
			t.Fatal(err)
		}
		senderKeys = senderKeys[1:]
	}
	if err := r.uow.flush(ctx); err != nil {
		t.Fatal(err)
	}
	var stored int
	if err := r.db.QueryRow(ctx, "SELECT COUNT(*) FROM crypto_olm_session WHERE sender_key=$1", fitting).Scan(&stored); err != nil || stored != 1 {
		t.Errorf("of the Olm session in which there is nothing to refuse %d are stored (%v)", stored, err)
	}
	if texts := noted(t, s.seed); len(texts) != 2 || texts[0] != "before" || texts[1] != "behind" {
		t.Errorf("stored: %.100q", texts)
	}
	want := errors.New("not the database's fault")
	r.uow.stage(func(context.Context) error { return want })
	if err := r.uow.flush(ctx); !errors.Is(err, want) {
		t.Errorf("another error was swallowed: %v", err)
	}
}

// randomText cannot be compressed, which PostgreSQL would do to make it fit.
func randomText(length int) string {
	var text strings.Builder
	for text.Len() < length {
		text.WriteString(forgedSignature())
	}
	return text.String()
}

func TestSecretsAreNotInTheErrorsOfPostgreSQL(t *testing.T) {
	const password = "hunter2"
	for _, uri := range []string{
		"postgres://bot:" + password + "@%zz/x", "postgres://bot:" + password + "@localhost:1/x?sslmode=nonsense", "host=localhost password=" + password + " port=x",
		"postgres://bot:" + password + "@127.0.0.1:1/x",
	} {
		db, err := OpenPostgres(uri)
		if err == nil {
			err = db.RawDB.PingContext(t.Context())
			_ = db.Close()
		}
		if err == nil || strings.Contains(err.Error(), password) {
			t.Errorf("%s: %v", uri, err)
		}
	}
}
