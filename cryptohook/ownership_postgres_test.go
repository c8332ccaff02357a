package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

func openPostgres(t *testing.T, uri string) *dbutil.Database {
	t.Helper()
	db := must(OpenPostgres(uri))
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// ownInBackground tries to become the owner, and gives the ownership when it has it.
func ownInBackground(t *testing.T, db *dbutil.Database, log io.Writer) <-chan *Ownership {
	t.Helper()
	ctx, owned := zerolog.New(log).WithContext(t.Context()), make(chan *Ownership, 1)
	go func() {
		owner, err := Own(ctx, db)
		if err == nil {
			owned <- owner
		} else if ctx.Err() == nil {
			t.Error(err)
		}
	}()
	return owned
}

// standBehind stands by, and returns when the log says so, with all the words.
func standBehind(t *testing.T, db *dbutil.Database) <-chan *Ownership {
	t.Helper()
	watch := &logWatch{text: "standing by until it is gone", seen: make(chan struct{}, 1)}
	owned := ownInBackground(t, db, watch)
	watch.wait(t)
	return owned
}

// takesOver waits for the new owner.
func takesOver(t *testing.T, owned <-chan *Ownership, limit time.Duration) *Ownership {
	t.Helper()
	select {
	case owner := <-owned:
		t.Cleanup(func() { _ = owner.Release() })
		return owner
	case <-time.After(limit):
		t.Fatalf("nobody has taken over within %v", limit)
		return nil
	}
}

// ownedStore is a store as the hook has it.
func ownedStore(db *dbutil.Database, owner *Ownership) *store {
	s := newStore(db, dbutil.NoopLogger)
	s.owner = owner
	return s
}

// note leaves a row, in a transaction of its own.
func note(ctx context.Context, s *store, text string) error {
	return s.write(ctx, func(ctx context.Context) error {
		return s.putWithheld(ctx, id.SessionID(text), "@a:test", event.RoomKeyWithheldUnverified, time.Now())
	})
}

// noted gives the rows that note has left.
func noted(t *testing.T, uri string) (texts []string) {
	t.Helper()
	db := openPostgres(t, uri)
	defer db.Close()
	rows, err := db.Query(t.Context(), "SELECT session_id FROM sendertrust_withheld ORDER BY session_id")
	return must(dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).AsList())
}

func TestOneAfterTheOtherTakesOver(t *testing.T) {
	uri := newPostgres(t)
	owner := own(t, openPostgres(t, uri))
	waiting := []<-chan *Ownership{standBehind(t, openPostgres(t, uri)), standBehind(t, openPostgres(t, uri))}
	for generation := int64(2); generation <= 3; generation++ {
		if err := owner.Release(); err != nil {
			t.Error(err)
		}
		if !errors.Is(owner.Err(), ErrNotOwner) {
			t.Errorf("the former owner ended with %v", owner.Err())
		}
		next := make(chan *Ownership, len(waiting))
		for _, owned := range waiting {
			go func() {
				select {
				case owner := <-owned:
					next <- owner
				case <-t.Context().Done():
				}
			}()
		}
		if owner = takesOver(t, next, 5*time.Second); owner.generation != generation {
			t.Errorf("owner number %d, want %d", owner.generation, generation)
		}
		waiting = []<-chan *Ownership{next}
	}
}

func TestFirstStartsAtOnceMakeOneOwnerAfterTheOther(t *testing.T) {
	uri := must(thePostgres(t).NewDatabase(t.Context()))
	const processes = 5
	owned := make(chan *Ownership, processes)
	var starts sync.WaitGroup
	for range processes {
		db := openPostgres(t, uri)
		starts.Go(func() {
			owner, err := Own(t.Context(), db)
			if err != nil {
				t.Error(err)
				return
			}
			owned <- owner
			if err = note(t.Context(), ownedStore(db, owner), fmt.Sprint(owner.generation)); err != nil {
				t.Error(err)
			}
			if err = owner.Release(); err != nil {
				t.Error(err)
			}
		})
	}
	starts.Wait()
	if texts := noted(t, uri); !slices.Equal(texts, []string{"1", "2", "3", "4", "5"}) {
		t.Errorf("the owners were %v", texts)
	}
}

// sever ends the connections of which the server shows a name like this one.
func sever(t *testing.T, uri, name string) (ended int) {
	t.Helper()
	conn := must(pgx.Connect(t.Context(), uri))
	defer conn.Close(t.Context())
	const query = `
		SELECT COUNT(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
		WHERE datname=current_database() AND application_name LIKE $1 AND pid<>pg_backend_pid()
	`
	if err := conn.QueryRow(t.Context(), query, name).Scan(&ended); err != nil {
		t.Fatal(err)
	}
	return ended
}

func TestOwnerGoesOnWhenItsConnectionsAreCutAndNobodyStandsBy(t *testing.T) {
	uri := newPostgres(t)
	db := openPostgres(t, uri)
	watch := &logWatch{text: "owns the database again", seen: make(chan struct{}, 1)}
	owner, err := Own(zerolog.New(watch).WithContext(t.Context()), db)
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Release()
	s := ownedStore(db, owner)
	if err = note(t.Context(), s, "before"); err != nil {
		t.Fatal(err)
	}
	if ended := sever(t, uri, "%"); ended < 2 {
		t.Errorf("%d connections were cut", ended)
	}
	watch.wait(t)
	if err = note(t.Context(), s, "after"); err != nil || owner.Err() != nil {
		t.Errorf("errors %v, %v", err, owner.Err())
	}
	waiting := standBehind(t, openPostgres(t, uri))
	if len(waiting) > 0 {
		t.Error("the lock was not got back")
	}
}

// gate is a way to the server that can be shut: what is connected by it stays connected, and nothing comes through, as if the
// process had been stopped.
type gate struct {
	listener net.Listener
	target   string
	mu       sync.Mutex
	open     *sync.Cond
	shut     bool
	copying  sync.WaitGroup
	conns    []net.Conn
}

// newGate gives a way to the database, and its URI.
func newGate(t *testing.T, uri string) (*gate, string) {
	t.Helper()
	parsed := must(url.Parse(uri))
	dir := t.TempDir()
	const socket = ".s.PGSQL.5432"
	g := &gate{target: filepath.Join(parsed.Query().Get("host"), socket), listener: must(net.Listen("unix", filepath.Join(dir, socket)))}
	g.open = sync.NewCond(&g.mu)
	listener := g.listener
	g.copying.Go(func() { g.accept(listener) })
	t.Cleanup(func() {
		_ = g.listener.Close()
		g.set(false)
		g.mu.Lock()
		for _, conn := range g.conns {
			_ = conn.Close()
		}
		g.mu.Unlock()
		g.copying.Wait()
	})
	parsed.RawQuery = url.Values{"host": {dir}}.Encode()
	return g, parsed.String()
}

func (g *gate) accept(listener net.Listener) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("unix", g.target)
		if err != nil {
			_ = client.Close()
			return
		}
		g.mu.Lock()
		g.conns = append(g.conns, client, server)
		g.mu.Unlock()
		g.copying.Go(func() { g.pass(client, server) })
		g.copying.Go(func() { g.pass(server, client) })
	}
}

func (g *gate) pass(to, from net.Conn) {
	defer to.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		g.mu.Lock()
		for g.shut {
			g.open.Wait()
		}
		g.mu.Unlock()
		if err != nil {
			return
		}
		if _, err = to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (g *gate) set(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = shut
	g.open.Broadcast()
}

// TestOwnerThatIsNotHeardOfIsReplacedAndWritesNothing stops the owner in the middle of a unit of work, with idle connections beside it.
func TestOwnerThatIsNotHeardOfIsReplacedAndWritesNothing(t *testing.T) {
	t.Parallel()
	uri := newPostgres(t)
	way, through := newGate(t, uri)
	paused := openPostgres(t, through)
	paused.RawDB.SetMaxIdleConns(3)
	first := own(t, paused)
	s := ownedStore(paused, first)
	if err := note(t.Context(), s, "before"); err != nil {
		t.Fatal(err)
	}
	idle := must(paused.RawDB.Conn(t.Context()))
	if err := idle.PingContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := openPostgres(t, uri)
	waiting := standBehind(t, next)
	inTransaction, goOn, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- s.write(t.Context(), func(ctx context.Context) error {
			err := s.putWithheld(ctx, "within", "@a:test", event.RoomKeyWithheldUnverified, time.Now())
			close(inTransaction)
			<-goOn
			return err
		})
	}()
	<-inTransaction
	way.set(true)
	begun := time.Now()
	second := takesOver(t, waiting, 10*time.Second)
	t.Logf("taken over %v after the owner was heard of", time.Since(begun).Round(time.Millisecond))
	if err := note(t.Context(), ownedStore(next, second), "after"); err != nil {
		t.Error(err)
	}
	// The lock is free again. That must not be enough for the former owner.
	if err := second.Release(); err != nil {
		t.Error(err)
	}
	way.set(false)
	close(goOn)
	if err := <-ended; err == nil {
		t.Error("the former owner has committed what it had begun")
	}
	if _, err := idle.ExecContext(t.Context(), "DELETE FROM sendertrust_withheld"); err == nil {
		t.Error("a connection from before still writes")
	}
	select {
	case <-first.Lost():
	case <-time.After(5 * time.Second):
		t.Fatal("the former owner does not notice")
	}
	if err := note(t.Context(), s, "too late"); !errors.Is(err, ErrNotOwner) {
		t.Errorf("a unit of work of the former owner ends with %v", err)
	}
	if _, err := paused.Exec(t.Context(), "DELETE FROM sendertrust_withheld"); !errors.Is(err, ErrNotOwner) {
		t.Errorf("a new connection of the former owner ends with %v", err)
	}
	if texts := noted(t, uri); !slices.Equal(texts, []string{"after", "before"}) {
		t.Errorf("written: %v", texts)
	}
}

func TestWriterOfAnEarlierGenerationFindsOutByItself(t *testing.T) {
	uri := newPostgres(t)
	db := openPostgres(t, uri)
	owner := own(t, db)
	s := ownedStore(db, owner)
	if err := note(t.Context(), s, "before"); err != nil {
		t.Fatal(err)
	}
	if _, err := openPostgres(t, uri).Exec(t.Context(), "UPDATE sendertrust_owner SET generation=generation+1"); err != nil {
		t.Fatal(err)
	}
	if err := note(t.Context(), s, "after"); !errors.Is(err, ErrNotOwner) || !strings.Contains(err.Error(), "number 2 has taken over") {
		t.Errorf("error %v", err)
	}
	if owner.Err() == nil {
		t.Error("the owner goes on")
	}
	if texts := noted(t, uri); !slices.Equal(texts, []string{"before"}) {
		t.Errorf("written: %v", texts)
	}
}

// A unit of work of the former owner that has begun is waited for: it is before the take-over.
func TestWritersComeOneAfterTheOther(t *testing.T) {
	uri := newPostgres(t)
	db := openPostgres(t, uri)
	s := ownedStore(db, own(t, db))
	var inside, most int
	var mu sync.Mutex
	count := func(by int) {
		mu.Lock()
		defer mu.Unlock()
		inside += by
		most = max(most, inside)
	}
	var writers sync.WaitGroup
	for i := range 8 {
		writers.Go(func() {
			for range 10 {
				err := s.write(t.Context(), func(ctx context.Context) error {
					count(1)
					defer count(-1)
					return s.putWithheld(ctx, id.SessionID(fmt.Sprint(i)), "@a:test", event.RoomKeyWithheldUnverified, time.Now())
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	if most != 1 {
		t.Errorf("%d writers at once", most)
	}
}

// A process that stands by again has connections from when it was the owner.
func TestOwnerAgainUsesNoConnectionOfTheFirstTime(t *testing.T) {
	uri := newPostgres(t)
	db := openPostgres(t, uri)
	db.RawDB.SetMaxOpenConns(1)
	db.RawDB.SetMaxIdleConns(1)
	for generation := range 2 {
		owner := own(t, db)
		if err := note(t.Context(), ownedStore(db, owner), fmt.Sprint(generation)); err != nil {
			t.Fatal(err)
		}
		var name string
		if err := db.QueryRow(t.Context(), "SELECT current_setting('application_name')").Scan(&name); err != nil || name != owner.applicationName() {
			t.Errorf("the connection is that of %s (%v), want %s", name, err, owner.applicationName())
		}
		if err := owner.Release(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRoleThatMayNotEndConnectionsTakesOverAllTheSame has the former owner hang in the middle of a unit of work: the server ends that.
func TestRoleThatMayNotEndConnectionsTakesOverAllTheSame(t *testing.T) {
	t.Parallel()
	server, uri := thePostgres(t), newPostgres(t)
	name := must(pgx.ParseConfig(uri)).Database
	err := server.Exec(t.Context(), name, `
		CREATE ROLE limited LOGIN;
		GRANT ALL ON ALL TABLES IN SCHEMA public TO limited;
	`)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Exec(context.Background(), name, `DROP OWNED BY limited; DROP ROLE limited`); err != nil {
			t.Error(err)
		}
	})
	former := openPostgres(t, uri)
	first := own(t, former)
	s := ownedStore(former, first)
	if err = note(t.Context(), s, "before"); err != nil {
		t.Fatal(err)
	}
	inTransaction, goOn, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- s.write(t.Context(), func(context.Context) error {
			close(inTransaction)
			<-goOn
			return nil
		})
	}()
	<-inTransaction
	limited := openPostgres(t, server.URIAs("limited", name))
	watch := &logWatch{text: "use one role for all that stand by", seen: make(chan struct{}, 1)}
	owned := ownInBackground(t, limited, watch)
	if err = first.Release(); err != nil {
		t.Fatal(err)
	}
	second := takesOver(t, owned, 10*time.Second)
	watch.wait(t)
	close(goOn)
	if err = <-ended; err == nil {
		t.Error("the former owner has committed what it had begun")
	}
	if err = note(t.Context(), s, "too late"); !errors.Is(err, ErrNotOwner) {
		t.Errorf("error %v", err)
	}
	if err = note(t.Context(), ownedStore(limited, second), "after"); err != nil {
		t.Error(err)
	}
	if texts := noted(t, uri); !slices.Equal(texts, []string{"after", "before"}) {
		t.Errorf("written: %v", texts)
	}
}

func TestNewerTablesAreNotTakenOver(t *testing.T) {
	db := openPostgres(t, newPostgres(t))
	move := func(by int) {
		if _, err := db.Exec(t.Context(), "UPDATE "+versionTable+" SET version=version+$1, compat=compat+$1", by); err != nil {
			t.Fatal(err)
		}
	}
	move(1)
	defer move(-1) // another test may get the database
	if _, err := Own(t.Context(), db); !errors.Is(err, dbutil.ErrUnsupportedDatabaseVersion) {
		t.Errorf("error %v", err)
	}
}

func TestDatabaseThatCannotBeOwnedIsAnErrorAtOnce(t *testing.T) {
	server := thePostgres(t)
	if _, err := Own(t.Context(), openPostgres(t, server.URI("missing"))); err == nil || !strings.Contains(err.Error(), "3D000") {
		t.Errorf("a missing database: %v", err)
	}
	if _, err := Own(t.Context(), openPostgres(t, server.URIAs("nobody", "postgres"))); err == nil || !strings.Contains(err.Error(), "28000") {
		t.Errorf("a missing role: %v", err)
	}
	foreign := must(dbutil.NewWithDB(stdlib.OpenDB(*must(pgx.ParseConfig(server.URI("postgres")))), "postgres"))
	defer foreign.Close()
	if _, err := Own(t.Context(), foreign); !errors.Is(err, ErrNotOpened) {
		t.Errorf("a database that was opened otherwise: %v", err)
	}
	if _, err := OpenPostgres("postgres://user:hunter2@host:port/x"); !errors.Is(err, ErrPostgresURI) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a malformed URI: %v", err)
	}
}

func TestStandByWaitsForAServerThatIsAway(t *testing.T) {
	uri := newPostgres(t)
	way, through := newGate(t, uri)
	_ = way.listener.Close()
	watch := &logWatch{text: "cannot be reached, trying again", seen: make(chan struct{}, 1)}
	owned := ownInBackground(t, openPostgres(t, through), watch)
	watch.wait(t)
	listener := must(net.Listen("unix", filepath.Join(must(url.Parse(through)).Query().Get("host"), ".s.PGSQL.5432")))
	way.listener = listener
	way.copying.Go(func() { way.accept(listener) })
	takesOver(t, owned, 5*time.Second)
}

// Whoever looks right after a release sees it: the server need not notice first that a connection has ended.
func TestReleaseIsSeenAtOnce(t *testing.T) {
	uri := newPostgres(t)
	db, other := openPostgres(t, uri), openPostgres(t, uri)
	for range 20 {
		owner := must(Own(t.Context(), db))
		if err := owner.Release(); err != nil {
			t.Fatal(err)
		}
		if found := must(Inspect(t.Context(), other)); found.Owner != "" {
			t.Fatalf("released, and still owned by %s", found.Owner)
		}
	}
}
