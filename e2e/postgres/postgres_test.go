package postgres

import (
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
