package bot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"go.mau.fi/util/dbutil"

	"sendertrust/cryptohook"
)

const (
	databaseOwner = "sendertrust"
	// checkTimeout is how long a server may take to let a check in.
	checkTimeout = 10 * time.Second
)

// openDatabase prepares the database. A server is not connected to yet.
func (b *Bot) openDatabase() (err error) {
	pool := dbutil.PoolConfig{Type: b.config.Database.Type, URI: b.config.Database.URI.Reveal(), MaxOpenConns: 5, MaxIdleConns: 5}
	if pool.Type == Postgres {
		if b.db, err = cryptohook.OpenPostgres(pool.URI); err == nil {
			b.db.Owner, b.db.Log = databaseOwner, cryptohook.DatabaseLog(b.log)
			err = b.db.Configure(dbutil.Config{PoolConfig: pool})
		}
	} else {
		b.db, err = dbutil.NewFromConfig(databaseOwner, dbutil.Config{PoolConfig: pool}, cryptohook.DatabaseLog(b.log))
	}
	if err != nil {
		return setupError("database: %w", err)
	}
	return nil
}

func (b *Bot) closeDatabase() {
	if err := b.db.Close(); err != nil {
		b.log.Err(err).Msg("Failed to close the database")
	}
}

// own makes sure that this process is the only one that works with the database. On PostgreSQL it stands by until it is.
func (b *Bot) own(ctx context.Context) (err error) {
	if b.owner != nil && b.owner.Err() == nil {
		return nil
	}
	b.release()
	b.owner, err = cryptohook.Own(b.log.WithContext(ctx), b.db)
	return databaseError(err)
}

func (b *Bot) release() {
	if b.owner == nil {
		return
	}
	if err := b.owner.Release(); err != nil {
		b.log.Err(err).Msg("Failed to release the database")
	}
	b.owner = nil
}

// databaseError words what somebody has to change about the database.
func databaseError(err error) error {
	if inUse, ok := errors.AsType[*cryptohook.DatabaseInUseError](err); ok {
		return setupError("database.uri: %w", inUse)
	}
	if errors.Is(err, dbutil.ErrUnsupportedDatabaseVersion) {
		return setupError("database.uri: %w; use the version of the program that made them, or a newer one", err)
	}
	refusal, ok := errors.AsType[*pgconn.PgError](err)
	switch {
	case !ok:
		return err
	case refusal.Code == "3D000":
		return setupError("database.uri: the server has no such database (%s); make it with: createdb", refusal.Message)
	case strings.HasPrefix(refusal.Code, "28"):
		return setupError("database.uri: the server refuses the user or the password (%s); correct them", refusal.Message)
	case refusal.Code == "42501":
		return setupError("database.uri: the user lacks a right (%s); make the user the owner of the database", refusal.Message)
	default:
		return err
	}
}

// checkDatabase says what the database is, without changing it.
func (b *Bot) checkDatabase(ctx context.Context) (description string, err error) {
	if file, err := sqliteFile(b.config.Database.URI.Reveal()); b.config.Database.Type != Postgres && err == nil {
		if _, err = os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			return "new", nil
		}
	}
	if err = b.openDatabase(); err != nil {
		return "", err
	}
	defer b.closeDatabase()
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	found, err := cryptohook.Inspect(ctx, b.db)
	if err = databaseError(err); err != nil && !errors.Is(err, ErrSetup) {
		return "", setupError("database.uri: the database cannot be used (%w)", err)
	} else if err != nil {
		return "", err
	}
	description = found.Software + ", new"
	if found.Tables > 0 {
		description = fmt.Sprintf("%s, tables of version %d", found.Software, found.Tables)
	}
	switch {
	case found.Owner == "":
		return description + ", not in use", nil
	case b.config.Database.Type == Postgres:
		return description + ", in use by " + found.Owner + ", behind which another stands by", nil
	default:
		return description + ", in use by " + found.Owner + ", so that another cannot start", nil
	}
}
