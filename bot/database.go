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
	"github.com/mattn/go-sqlite3"
	"go.mau.fi/util/dbutil"

	"sendertrust/cryptohook"
)

const (
	databaseOwner = "sendertrust"
	// checkTimeout is how long a server may take to let a check in.
	checkTimeout = 10 * time.Second
)

// openDatabase prepares the database. It is not connected to yet.
func (b *Bot) openDatabase() error { return b.prepareDatabase(false) }

func (b *Bot) prepareDatabase(toLookOnly bool) (err error) {
	uri := b.config.Database.URI.Reveal()
	if b.config.Database.Type == Postgres {
		b.db, err = cryptohook.OpenPostgres(uri)
	} else {
		options := cryptohook.SQLiteOptions{Driver: b.config.Database.Type, URI: uri, Log: b.log.With().Str("component", "database").Logger()}
		if options.File, err = sqliteFile(uri); err == nil {
			if options.File == inMemory {
				options.File = ""
			}
			options.ReadOnly = toLookOnly && options.File != ""
			b.db, err = cryptohook.OpenSQLite(options)
		}
	}
	if err != nil {
		return setupError("database: %w", err)
	}
	b.db.Owner, b.db.Log = databaseOwner, cryptohook.DatabaseLog(b.log)
	return b.db.Configure(dbutil.Config{PoolConfig: dbutil.PoolConfig{MaxOpenConns: 5, MaxIdleConns: 5}})
}

// inMemory is the name that [sqliteFile] has for a database that is in no file.
const inMemory = ":memory:"

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
	if failed, ok := errors.AsType[sqlite3.Error](err); ok && failed.Code == sqlite3.ErrReadonly {
		return setupError("database.uri: the file cannot be written (%w); give the bot's user the right to write it, or make its disk writable", failed)
	}
	if err == nil {
		err = cryptohook.CheckKeys(ctx, b.db, []byte(b.config.Encryption.PickleKey.Reveal()))
	}
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
	if err == nil || errors.Is(err, ErrSetup) {
		return err
	}
	if inUse, ok := errors.AsType[*cryptohook.DatabaseInUseError](err); ok {
		return setupError("database.uri: %w", inUse)
	}
	if errors.Is(err, dbutil.ErrUnsupportedDatabaseVersion) {
		return setupError("database.uri: %w; use the version of the program that made them, or a newer one", err)
	}
	if damage, ok := errors.AsType[*cryptohook.DamagedError](err); ok {
		return setupError("database.uri: %w; restore a backup of it (sendertrust --check says what is damaged), or, to start anew with a new device, move it away", damage)
	}
	if errors.Is(err, cryptohook.ErrPickleKey) {
		return setupError("encryption.pickle_key: %w; give the key that the database was made with, or use a new database", cryptohook.ErrPickleKey)
	}
	refusal, ok := errors.AsType[*pgconn.PgError](err)
	switch {
	case !ok:
		return err
	case refusal.Code == "3D000":
		return setupError("database.uri: the server has no such database (%s); make it with: createdb", refusal.Message)
	case strings.HasPrefix(refusal.Code, "28"):
		return setupError("database.uri: the server refuses the user or the password (%s); correct them", refusal.Message)
	case strings.HasPrefix(refusal.Code, "XX001"), strings.HasPrefix(refusal.Code, "XX002"):
		return setupError("database.uri: the server says that the database is damaged (%s); restore a backup of it", refusal.Message)
	case refusal.Code == "42501":
		return setupError("database.uri: the user lacks a right (%s); make the user the owner of the database", refusal.Message)
	default:
		return err
	}
}

// checkDatabase says what the database is, without changing it.
func (b *Bot) checkDatabase(ctx context.Context) (description string, err error) {
	if err = b.prepareDatabase(true); err != nil {
		return "", err
	}
	defer b.closeDatabase()
	if file, err := sqliteFile(b.config.Database.URI.Reveal()); b.config.Database.Type != Postgres && err == nil {
		if _, err = os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			err = b.db.RawDB.PingContext(ctx)
			if damage, ok := errors.AsType[*cryptohook.DamagedError](err); ok {
				return "", databaseError(damage)
			}
			return "new", nil
		}
	}
	inspecting, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	found, err := cryptohook.Inspect(inspecting, b.db)
	if err == nil {
		err = b.verifyDatabase(ctx)
	}
	if err = databaseError(err); err != nil && !errors.Is(err, ErrSetup) {
		return "", setupError("database.uri: the database cannot be used (%w)", err)
	} else if err != nil {
		return "", err
	}
	description = found.Software + ", new"
	if found.Tables > 0 {
		description = fmt.Sprintf("%s, tables of version %d, undamaged", found.Software, found.Tables)
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

// verifyDatabase reads all of the database, for damage.
func (b *Bot) verifyDatabase(ctx context.Context) error {
	damage, err := cryptohook.VerifyDatabase(ctx, b.db, []byte(b.config.Encryption.PickleKey.Reveal()))
	if err != nil || len(damage) == 0 {
		return err
	}
	file, _ := sqliteFile(b.config.Database.URI.Reveal())
	if b.config.Database.Type == Postgres {
		file = ""
	}
	return &cryptohook.DamagedError{File: file, Why: errors.New(strings.Join(damage, "; "))}
}
