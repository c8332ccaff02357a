package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto/goolm/libolmpickle"
)

// DatabaseState is what [Inspect] finds.
type DatabaseState struct {
	// Software is the database's name and version.
	Software string
	// Tables is the version of this package's tables; zero when there are none yet.
	Tables int
	// Owner is the process that owns the database now, for people; empty when none does.
	Owner string
}

const (
	getTablesQuery          = `SELECT version, compat FROM sendertrust_version`
	getSQLiteVersionQuery   = `SELECT 'SQLite ' || sqlite_version()`
	getPostgresVersionQuery = `SELECT 'PostgreSQL ' || current_setting('server_version')`
	isLockedQuery           = `
		SELECT EXISTS(
			SELECT 1 FROM pg_locks JOIN pg_database ON pg_database.oid=pg_locks.database
			WHERE datname=current_database() AND locktype='advisory' AND objsubid=1 AND granted
			  AND classid::bigint=$1 AND objid::bigint=$2
		)
	`
)

// Inspect says what is in a database, and changes nothing. It fails with [dbutil.ErrUnsupportedDatabaseVersion] when the tables are
// newer than this package.
func Inspect(ctx context.Context, db *dbutil.Database) (found DatabaseState, err error) {
	software, owner := getSQLiteVersionQuery, fileOwner
	if db.Dialect == dbutil.Postgres {
		software, owner = getPostgresVersionQuery, lockOwner
	}
	if err = db.QueryRow(ctx, software).Scan(&found.Software); err != nil {
		return found, fmt.Errorf("failed to ask for the database's version: %w", err)
	}
	exists, err := db.TableExists(ctx, versionTable)
	if err != nil {
		return found, fmt.Errorf("failed to look for tables: %w", err)
	}
	if exists {
		var compatible int
		if err = db.QueryRow(ctx, getTablesQuery).Scan(&found.Tables, &compatible); err != nil {
			return found, fmt.Errorf("failed to read the version of the tables: %w", err)
		} else if newest := len(upgradeTable); compatible > newest {
			return found, fmt.Errorf("%w: the tables are of version %d, and this program knows those up to %d", dbutil.ErrUnsupportedDatabaseVersion, found.Tables, newest)
		}
	}
	found.Owner, err = owner(ctx, db)
	return found, err
}

// mostDamage is how much of what is damaged is told of each kind.
const mostDamage = 10

// pickles are where the keys of a database are: a statement for each kind gives what it belongs to, and the encrypted key.
var pickles = []struct{ table, what, query string }{
	{"crypto_account", "the keys of account", `SELECT account_id, account FROM crypto_account`},
	{"crypto_secrets", "the secret", `SELECT name, secret FROM crypto_secrets`},
	{"crypto_olm_session", "Olm session", `SELECT session_id, session FROM crypto_olm_session`},
	{"crypto_megolm_outbound_session", "the key of the own session", `SELECT session_id, session FROM crypto_megolm_outbound_session`},
	{"crypto_megolm_inbound_session", "the key of session", `SELECT session_id, session FROM crypto_megolm_inbound_session WHERE session IS NOT NULL`},
}

// VerifyDatabase reads all of a database, and gives what is damaged in it: pages, indices, and keys that the pickle key does not decrypt. It
// fails with [ErrPickleKey] when that decrypts none. It changes nothing, and takes some minutes for millions of keys.
func VerifyDatabase(ctx context.Context, db *dbutil.Database, pickleKey []byte) (damage []string, err error) {
	if db.Dialect == dbutil.SQLite {
		damage, err = checkPages(ctx, db, fmt.Sprintf("PRAGMA integrity_check(%d)", mostDamage))
		// What is told of damaged pages need not be all that is damaged, and to read on may end in another error than that.
		if err != nil || len(damage) > 0 {
			return damage, err
		}
	}
	var read, unreadable int
	for _, kind := range pickles {
		if exists, err := db.TableExists(ctx, kind.table); err != nil {
			return nil, fmt.Errorf("failed to look for tables: %w", err)
		} else if !exists {
			continue
		}
		rows, err := db.Query(ctx, kind.query)
		told := 0
		err = dbutil.NewRowIterWithError(rows, scanPickle, err).Iter(func(key pickledKey) (bool, error) {
			if _, err := libolmpickle.Unpickle(pickleKey, key.pickle); err == nil {
				read++
				return true, nil
			}
			unreadable++
			if told++; told <= mostDamage {
				damage = append(damage, fmt.Sprintf("%s %s cannot be decrypted", kind.what, key.name))
			}
			return true, nil
		})
		if err != nil {
			return nil, fmt.Errorf("failed to read keys: %w", err)
		}
		if told > mostDamage {
			damage = append(damage, fmt.Sprintf("and %d more of these", told-mostDamage))
		}
	}
	if unreadable > 0 && read == 0 {
		return nil, ErrPickleKey
	}
	return damage, nil
}

type pickledKey struct {
	name   string
	pickle []byte
}

func scanPickle(row dbutil.Scannable) (key pickledKey, err error) {
	return key, row.Scan(&key.name, &key.pickle)
}

// fileOwner says who has the lock of an SQLite database.
func fileOwner(ctx context.Context, db *dbutil.Database) (name string, err error) {
	file, err := databaseFile(ctx, db)
	if err != nil || file == "" {
		return "", err
	}
	lock, err := os.Open(file + lockSuffix)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", fmt.Errorf("failed to look at the database's lock: %w", err)
	}
	defer lock.Close()
	if err = syscall.Flock(int(lock.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Sprintf("process %d", readPID(lock)), nil
	}
	return "", err
}

// lockOwner says who has the lock of a PostgreSQL database.
func lockOwner(ctx context.Context, db *dbutil.Database) (name string, err error) {
	var locked bool
	if err = db.QueryRow(ctx, isLockedQuery, ownerLock>>32, ownerLock&(1<<32-1)).Scan(&locked); err != nil || !locked {
		return "", err
	}
	if exists, err := db.TableExists(ctx, "sendertrust_owner"); err != nil || !exists {
		return "a process that has just begun", err
	}
	err = db.QueryRow(ctx, getHolderNameQuery).Scan(&name)
	return name, ignoreNoRows(err)
}
