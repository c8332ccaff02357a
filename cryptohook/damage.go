package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/goolm/libolmpickle"
	"maunium.net/go/mautrix/id"
)

// DamagedError says that a database is damaged. Nothing was done to mend it: what is mended by leaving something out is lost.
type DamagedError struct {
	// File is the database's file; empty for one on a server.
	File string
	// Why is how it shows.
	Why error
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("the database%s is damaged (%v), and was left as it is", strings.TrimSuffix(" "+e.File, " "), e.Why)
}

func (e *DamagedError) Unwrap() error { return e.Why }

// A key that cannot be decrypted is damage, if the database gives it and others can be decrypted. These methods of the unit of work find
// that out for the keys that mautrix reads.

// GetSecret implements [crypto.Store].
func (u *unitOfWork) GetSecret(ctx context.Context, name id.Secret) (string, error) {
	secret, err := u.SQLCryptoStore.GetSecret(ctx, name)
	if err != nil {
		err = u.orUnreadable(ctx, err, "the secret "+string(name), getSecretQuery, u.AccountID, name)
	}
	return secret, err
}

// GetOutboundGroupSession implements [crypto.Store].
func (u *unitOfWork) GetOutboundGroupSession(ctx context.Context, roomID id.RoomID) (*crypto.OutboundGroupSession, error) {
	session, err := u.SQLCryptoStore.GetOutboundGroupSession(ctx, roomID)
	if err != nil {
		err = u.orUnreadable(ctx, err, "the key of the own session of "+roomID.String(), getOutboundPickleQuery, u.AccountID, roomID)
	}
	return session, err
}

const (
	getOwnPicklesQuery     = `SELECT account FROM crypto_account UNION ALL SELECT secret FROM crypto_secrets`
	getSecretQuery         = `SELECT secret FROM crypto_secrets WHERE account_id=$1 AND name=$2`
	getOutboundPickleQuery = `SELECT session FROM crypto_megolm_outbound_session WHERE account_id=$1 AND room_id=$2`
	getOlmPicklesQuery     = `SELECT session FROM crypto_olm_session WHERE account_id=$1 AND sender_key=$2`
	getGroupPickleQuery    = `SELECT session FROM crypto_megolm_inbound_session WHERE account_id=$1 AND session_id=$2 AND session IS NOT NULL`
	// Some keys of each kind tell whether the pickle key is the right one.
	getSomePicklesQuery = `
		SELECT account FROM crypto_account
		UNION ALL SELECT secret FROM crypto_secrets
		UNION ALL SELECT session FROM (SELECT session FROM crypto_olm_session LIMIT 20) olm
		UNION ALL SELECT session FROM (SELECT session FROM crypto_megolm_inbound_session WHERE session IS NOT NULL LIMIT 20) megolm
	`
)

// orUnreadable gives what it means that a key could not be read. The query gives the encrypted key, or several.
func (u *unitOfWork) orUnreadable(ctx context.Context, failure error, what, query string, args ...any) error {
	if _, unreadable, err := tryPickles(ctx, u.DB, u.PickleKey, query, args...); err != nil || unreadable == 0 {
		return failure
	}
	return damagedBy(u.DB, fmt.Errorf("%s cannot be decrypted: %w", what, failure))
}

func tryPickles(ctx context.Context, db *dbutil.Database, pickleKey []byte, query string, args ...any) (decrypted, unreadable int, err error) {
	rows, err := db.Query(ctx, query, args...)
	err = dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[[]byte], err).Iter(func(pickle []byte) (bool, error) {
		if _, err := libolmpickle.Unpickle(pickleKey, pickle); err != nil {
			unreadable++
		} else {
			decrypted++
		}
		return true, nil
	})
	return decrypted, unreadable, err
}

// whyNotLoaded gives what it means that the account could not be loaded.
func (u *unitOfWork) whyNotLoaded(ctx context.Context, failure error) error {
	if err := CheckKeys(ctx, u.DB, u.PickleKey); err != nil {
		return err
	}
	return fmt.Errorf("failed to load the account: %w", failure)
}

// CheckKeys makes sure, without changing anything, that the pickle key decrypts the keys of the account in the database and of its identity.
// It fails with [ErrPickleKey] when it decrypts nothing there, and with a [DamagedError] when it decrypts something else.
func CheckKeys(ctx context.Context, db *dbutil.Database, pickleKey []byte) error {
	for _, own := range pickles[:2] {
		if exists, err := db.TableExists(ctx, own.table); err != nil {
			return fmt.Errorf("failed to look for keys: %w", err)
		} else if !exists {
			return nil
		}
	}
	_, unreadable, err := tryPickles(ctx, db, pickleKey, getOwnPicklesQuery)
	if err != nil {
		return fmt.Errorf("failed to read the account's keys: %w", err)
	} else if unreadable == 0 {
		return nil
	}
	decrypted, _, err := tryPickles(ctx, db, pickleKey, getSomePicklesQuery)
	if err != nil {
		return fmt.Errorf("failed to read keys: %w", err)
	} else if decrypted == 0 {
		return ErrPickleKey
	}
	return damagedBy(db, errors.New("keys of the account cannot be decrypted, though others can"))
}

// damagedBy shuts a database whose content is damaged.
func damagedBy(db *dbutil.Database, why error) error {
	switch pool := db.RawDB.Driver().(type) {
	case *sqlitePool:
		return pool.damaged(why)
	case *postgresPool:
		damage := &DamagedError{Why: why}
		pool.owner.Load().abandon(damage)
		return damage
	default:
		return &DamagedError{Why: why}
	}
}

// startCheck is how long a start looks for damage. What is found in that time is all of a database of some tens of megabytes.
const startCheck = 400 * time.Millisecond

// getTableNamesQuery gives first what nothing works without, and last what becomes large.
const getTableNamesQuery = `
	SELECT name FROM sqlite_schema WHERE type='table' AND name NOT LIKE 'sqlite_%'
	ORDER BY name IN ('crypto_account', 'crypto_secrets', 'sendertrust_version', 'crypto_version') DESC,
	         name IN ('crypto_megolm_inbound_session', 'crypto_message_index', 'crypto_olm_message_hash', 'sendertrust_claim', 'sendertrust_inbox'), name
`

// checkStart makes sure, before anything is written, that a file can be written and is whole, as far as that can be told quickly.
func checkStart(ctx context.Context, db *dbutil.Database) error {
	// Whether the file can be written shows when a writer's lock is asked for.
	tx, err := db.RawDB.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("failed to write to the database: %w", err)
	}
	if err = tx.Rollback(); err != nil {
		return fmt.Errorf("failed to write to the database: %w", err)
	}
	checking, cancel := context.WithTimeout(ctx, startCheck)
	defer cancel()
	rows, err := db.Query(checking, getTableNamesQuery)
	tables, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).AsList()
	if err != nil {
		return fmt.Errorf("failed to read the database: %w", err)
	}
	for _, table := range tables {
		found, err := checkPages(checking, db, `PRAGMA quick_check('`+strings.ReplaceAll(table, "'", "''")+`')`)
		switch {
		case len(found) > 0:
			return damagedBy(db, errors.New(strings.Join(found, "; ")))
		case err != nil && checking.Err() != nil:
			if ctx.Err() != nil {
				return ctx.Err()
			}
			zerolog.Ctx(ctx).Debug().Str("table", table).Msg("The database is too large to be looked through at each start; --check does that")
			return nil
		case err != nil:
			return fmt.Errorf("failed to read the database: %w", err)
		}
	}
	return nil
}

// checkPages gives what SQLite says is damaged.
func checkPages(ctx context.Context, db *dbutil.Database, pragma string) (found []string, err error) {
	rows, err := db.Query(ctx, pragma)
	said, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).AsList()
	for _, line := range said {
		if line != "ok" {
			found = append(found, strings.ReplaceAll(strings.TrimPrefix(line, "*** in database main ***\n"), "\n", "; "))
		}
	}
	return found, err
}

// wasFilled says that the database had tables once, by the file of its lock.
func wasFilled(file string) bool {
	lock, err := os.Open(file + lockSuffix)
	if err != nil {
		return false
	}
	defer lock.Close()
	written, err := io.ReadAll(io.LimitReader(lock, longestLock))
	return err == nil && strings.Contains(string(written), filledMark)
}
