package postgres

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
)

const projectRoot = "../.."

func TestServerMakesDatabasesAndLeavesNothingBehind(t *testing.T) {
	if testing.Short() {
		t.Skip("needs PostgreSQL: not with -short")
	}
	server, err := Start(t.Context(), projectRoot)
	if err != nil {
		t.Fatal(err)
	}
	first, err := server.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	second, err := server.NewDatabase(t.Context())
	if err != nil || first == second {
		t.Errorf("databases %q and %q (%v)", first, second, err)
	}
	conn, err := pgx.Connect(t.Context(), second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if err = server.Stop(); err != nil {
		t.Error(err)
	}
	if err = conn.Ping(t.Context()); err == nil {
		t.Error("the server still answers")
	}
	if _, err = os.Stat(server.Dir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the server's directory is still there (%v)", err)
	}
}

func TestPoolLendsDatabasesThatAreEmpty(t *testing.T) {
	if testing.Short() {
		t.Skip("needs PostgreSQL: not with -short")
	}
	var pool *Pool
	pool = NewPool(projectRoot, func(ctx context.Context, uri string) error {
		return pool.server.Exec(ctx, "test1", "CREATE TABLE note (text TEXT)")
	})
	defer func() {
		if err := pool.Stop(); err != nil {
			t.Error(err)
		}
	}()
	rows := func(uri string) (rows int) {
		t.Helper()
		conn, err := pgx.Connect(t.Context(), uri)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		if err = conn.QueryRow(t.Context(), "SELECT COUNT(*) FROM note").Scan(&rows); err == nil {
			_, err = conn.Exec(t.Context(), "INSERT INTO note VALUES ('used')")
		}
		if err != nil {
			t.Fatal(err)
		}
		return rows
	}
	take := func() string {
		t.Helper()
		uri, err := pool.Take(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return uri
	}
	first, second := take(), take()
	if first == second {
		t.Error("one database is lent twice")
	}
	if rows(first) != 0 || rows(second) != 0 {
		t.Error("a new database is not empty")
	}
	if err := pool.GiveBack(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if again := take(); again != first || rows(again) != 0 {
		t.Errorf("after %s was given back, %s is lent, with what others have left there", first, again)
	}
	if third := take(); third == first || third == second {
		t.Errorf("%s is lent to two at once", third)
	}
}
