package bot

import (
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

func botWithDatabase(t *testing.T, kind, uri string) *Bot {
	t.Helper()
	config := defaultConfig()
	config.Database.Type, config.Database.URI = kind, Secret(uri)
	return New(config, zerolog.Nop())
}

// workWith has a bot own its database, with all tables, until the test says so.
func workWith(t *testing.T, b *Bot) (stop func()) {
	t.Helper()
	if err := b.openDatabase(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.closeDatabase)
	t.Cleanup(b.release)
	if err := b.own(t.Context()); err != nil {
		t.Fatal(err)
	}
	client := testBot(t).client
	client.DeviceID = "DEVICE"
	if _, err := cryptohook.Install(t.Context(), client, cryptohook.Options{DB: b.db, PickleKey: []byte("pickle"), Owner: b.owner}); err != nil {
		t.Fatal(err)
	}
	if err := b.own(t.Context()); err != nil {
		t.Errorf("the owner cannot go on: %v", err)
	}
	return b.release
}

// expectCheck compares what a check by another process would say of the database.
func expectCheck(t *testing.T, of *Bot, pattern string) {
	t.Helper()
	got, err := botWithDatabase(t, of.config.Database.Type, of.config.Database.URI.Reveal()).checkDatabase(t.Context())
	if err != nil || !regexp.MustCompile("^"+pattern+"$").MatchString(got) {
		t.Errorf("%q (%v), want %s", got, err, pattern)
	}
}

// expectRefusal compares what a check, and a start, say of a database that cannot be used.
func expectRefusal(t *testing.T, kind, uri string, words ...string) {
	t.Helper()
	b := botWithDatabase(t, kind, uri)
	_, checked := b.checkDatabase(t.Context())
	err := b.openDatabase()
	if err == nil {
		defer b.closeDatabase()
		if err = b.own(t.Context()); err == nil {
			b.release()
		}
	}
	for when, err := range map[string]error{"check": checked, "start": err} {
		if !errors.Is(err, ErrSetup) || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", when, err)
			continue
		}
		for _, word := range words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v\nwant %q", when, err, word)
			}
		}
	}
}

// makeNewer has the tables be those of a newer program.
func makeNewer(t *testing.T, b *Bot) {
	t.Helper()
	other := botWithDatabase(t, b.config.Database.Type, b.config.Database.URI.Reveal())
	if err := other.openDatabase(); err != nil {
		t.Fatal(err)
	}
	defer other.closeDatabase()
	if _, err := other.db.Exec(t.Context(), "UPDATE sendertrust_version SET version=1000, compat=1000"); err != nil {
		t.Fatal(err)
	}
}

func TestCheckSaysWhatAFileHolds(t *testing.T) {
	t.Chdir(t.TempDir())
	b := botWithDatabase(t, "sqlite3-fk-wal", "file:bot.db?_txlock=immediate")
	expectCheck(t, b, "new")
	stop := workWith(t, b)
	expectCheck(t, b, `SQLite 3[.\d]+, tables of version \d+, undamaged, in use by process \d+, so that another cannot start`)
	stop()
	expectCheck(t, b, `SQLite 3[.\d]+, tables of version \d+, undamaged, not in use`)
	makeNewer(t, b)
	if _, err := b.checkDatabase(t.Context()); !errors.Is(err, ErrSetup) || !strings.Contains(err.Error(), "the tables are of version 1000") {
		t.Errorf("error %v", err)
	}
}

func TestCheckSaysWhatAServerHolds(t *testing.T) {
	server := postgresServer(t)
	uri, err := server.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b := botWithDatabase(t, Postgres, uri)
	expectCheck(t, b, `PostgreSQL .*, new, not in use`)
	stop := workWith(t, b)
	expectCheck(t, b, `PostgreSQL .*, tables of version \d+, undamaged, in use by process \d+ on \S+, behind which another stands by`)
	stop()
	expectCheck(t, b, `PostgreSQL .*, tables of version \d+, undamaged, not in use`)
	makeNewer(t, b)
	expectRefusal(t, Postgres, uri, "database.uri: ", "unsupported database schema version", "a newer one")

	expectRefusal(t, Postgres, server.URI("missing"), `the server has no such database (database "missing" does not exist)`)
	expectRefusal(t, Postgres, server.URIAs("somebody", "postgres"), "the server refuses the user or the password", "somebody")
	err = server.Exec(t.Context(), "postgres", "DROP ROLE IF EXISTS guest; CREATE ROLE guest LOGIN")
	if err != nil {
		t.Fatal(err)
	}
	empty, err := server.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	guest := botWithDatabase(t, Postgres, strings.Replace(empty, "sendertrust@", "guest@", 1))
	if err = guest.openDatabase(); err != nil {
		t.Fatal(err)
	}
	defer guest.closeDatabase()
	if err = guest.own(t.Context()); !errors.Is(err, ErrSetup) || !strings.Contains(err.Error(), "make the user the owner of the database") {
		t.Errorf("a user without rights: %v", err)
	}
	away := botWithDatabase(t, Postgres, "postgres://bot:hunter2@127.0.0.1:1/bot")
	if _, err = away.checkDatabase(t.Context()); !errors.Is(err, ErrSetup) || strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("a server that is away: %v", err)
	}
}

func TestSecondProcessOnAFileCannotStart(t *testing.T) {
	t.Chdir(t.TempDir())
	b := botWithDatabase(t, "sqlite3-fk-wal", "file:bot.db?_txlock=immediate")
	stop := workWith(t, b)
	second := botWithDatabase(t, b.config.Database.Type, b.config.Database.URI.Reveal())
	if err := second.Run(t.Context()); !errors.Is(err, ErrSetup) || !strings.Contains(err.Error(), "bot.db is in use by process ") {
		t.Errorf("error %v", err)
	}
	stop()
}

// What the bot notes of its answers is refused to a process that has lost the database, as everything else is.
func TestFormerOwnerNotesNoAnswers(t *testing.T) {
	uri, err := postgresServer(t).NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b := botWithDatabase(t, Postgres, uri)
	workWith(t, b)
	notes := newRecords(b.db, b.owner, nil)
	if err = notes.Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	note := func(eventID id.EventID) error {
		_, err := notes.add(t.Context(), &record{eventID: eventID, toldAt: time.UnixMilli(1)})
		return err
	}
	if err = note("$first"); err != nil {
		t.Fatal(err)
	}
	if _, err = b.db.Exec(t.Context(), "UPDATE sendertrust_owner SET generation=generation+1"); err != nil {
		t.Fatal(err)
	}
	if err = note("$second"); !errors.Is(err, cryptohook.ErrNotOwner) {
		t.Errorf("error %v, want %v", err, cryptohook.ErrNotOwner)
	}
	if noted, err := notes.get(t.Context(), "$second"); noted != nil || err != nil {
		t.Errorf("noted %+v (%v)", noted, err)
	}
}
