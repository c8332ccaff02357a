package cryptohook

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"strings"
	"sync/atomic"

	"github.com/mattn/go-sqlite3"
	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
)

// SQLiteOptions say which file [OpenSQLite] opens, and how.
type SQLiteOptions struct {
	// Driver is the name of dbutil's driver: sqlite3-fk-wal-fullsync, unless a power failure may take the last messages' keys.
	Driver string
	// URI is what the driver understands, and File the path in it; no path for a database in memory.
	URI, File string
	// ReadOnly opens the file to look at it only: not even its log is merged into it.
	ReadOnly bool
	// Log is told what keeps the database from being written, and when that is over.
	Log zerolog.Logger
}

// OpenSQLite opens a database in SQLite for [Own] and [Install]. The database's pool differs from the driver's own, for mautrix's
// statements too, whose errors are often only logged:
//
//   - When the file turns out to be damaged, nothing more is read from it or written to it, and the process owns it no longer:
//     [Ownership.Err] is a [DamagedError] then. An empty file where keys were, or a missing one whose log is there, is not taken for a
//     new database.
//   - What keeps the file from being written (a full disk, another program) is told in the log, with what to do about it.
//   - A connection that was made while the file could not be written is not used again.
func OpenSQLite(options SQLiteOptions) (*dbutil.Database, error) {
	name, uri := options.Driver, options.URI
	if options.ReadOnly {
		name, uri = "sqlite3", "file:"+(&url.URL{Path: options.File}).EscapedPath()+"?mode=ro&_busy_timeout=5000"
	}
	opened, err := sql.Open(name, uri)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	pool := &sqlitePool{driver: opened.Driver(), uri: withStatementCache(uri), file: options.File}
	pool.trouble.log = options.Log
	return dbutil.NewWithDB(sql.OpenDB(pool), dbutil.SQLite.String())
}

// cachedStatements is how many prepared statements a connection keeps, those that were used last: more than the hook, mautrix and the bot have.
const cachedStatements = 256

// withStatementCache has the driver keep prepared statements, unless the URI says how many: most take longer to prepare than to run.
//
// SQLite prepares a statement anew all the same when its plan might depend on a parameter's value, and the driver has cleared what was bound
// before: wherever there is a choice of plans (by a join or an order) and a column is compared with a bare parameter, or a parameter is the
// limit. In what is asked for each message and each key, CAST has it not look at the value: see unguessed.
func withStatementCache(uri string) string {
	const parameter = "_stmt_cache_size"
	if strings.Contains(uri, parameter) {
		return uri
	}
	separator := "?"
	if strings.Contains(uri, "?") {
		separator = "&"
	}
	return fmt.Sprint(uri, separator, parameter, "=", cachedStatements)
}

// unguessed is the parameter $1, a text, of whose value SQLite makes no plan.
const unguessed = `CAST($1 AS TEXT)`

// sqlitePool makes the connections of one database. It is its own driver, by which it is found.
type sqlitePool struct {
	driver    driver.Driver
	uri, file string
	// owner is told when the database is damaged; nil before there is one.
	owner   atomic.Pointer[Ownership]
	damage  atomic.Pointer[DamagedError]
	trouble trouble
}

var (
	_ driver.Connector = (*sqlitePool)(nil)
	_ driver.Driver    = (*sqlitePool)(nil)
)

// Driver implements [driver.Connector].
func (p *sqlitePool) Driver() driver.Driver { return p }

// Open implements [driver.Driver].
func (p *sqlitePool) Open(string) (driver.Conn, error) { return p.Connect(context.Background()) }

// Connect implements [driver.Connector].
func (p *sqlitePool) Connect(context.Context) (driver.Conn, error) {
	if damage := p.damage.Load(); damage != nil {
		return nil, damage
	} else if err := p.refuseCut(); err != nil {
		return nil, err
	}
	made, err := p.driver.Open(p.uri)
	if err != nil {
		return nil, p.saw(err)
	}
	conn, ok := made.(*sqlite3.SQLiteConn)
	if !ok {
		return made, nil
	}
	return &sqliteConn{SQLiteConn: conn, pool: p}, nil
}

// refuseCut finds a file of which something was cut off, and that SQLite would take for a new one, throwing away the log of the old one,
// or for a whole one with zeros at its end.
func (p *sqlitePool) refuseCut() error {
	if p.file == "" {
		return nil
	}
	size, missing, err := sizeOf(p.file)
	if err != nil {
		return nil // SQLite will say so
	}
	logSize, _, _ := sizeOf(p.file + logSuffix)
	_, noJournal, _ := sizeOf(p.file + journalSuffix)
	switch {
	case missing && logSize > 0:
		return p.damaged(fmt.Errorf("the file is missing, and %s, which belongs to it, is there", p.file+logSuffix))
	case missing:
		return nil
	case size == 0 && (logSize > 0 || wasFilled(p.file)):
		return p.damaged(errors.New("the file is empty, and was not before"))
	case size%smallestPage != 0 && logSize == 0 && noJournal:
		// Until what is written to it is whole, SQLite has it in the log or in a journal, too.
		return p.damaged(fmt.Errorf("the file ends within a page, after %d bytes", size))
	}
	return nil
}

// smallestPage is what the size of every page is a multiple of, in bytes.
const smallestPage = 512

func sizeOf(file string) (size int64, missing bool, err error) {
	found, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, true, nil
	} else if err != nil {
		return 0, false, err
	}
	return found.Size(), false, nil
}

// saw takes note of an error, and gives what it means.
func (p *sqlitePool) saw(err error) error {
	failed, ok := errors.AsType[sqlite3.Error](err)
	if !ok {
		return err
	}
	if failed.Code == sqlite3.ErrCorrupt || failed.Code == sqlite3.ErrNotADB {
		return p.damaged(err)
	}
	p.trouble.begin(failed)
	return err
}

// damaged shuts the database: whoever has it must not make it worse.
func (p *sqlitePool) damaged(why error) error {
	damage := &DamagedError{File: p.file, Why: why}
	if !p.damage.CompareAndSwap(nil, damage) {
		damage = p.damage.Load()
	}
	p.owner.Load().abandon(damage)
	return damage
}

// sqliteConn is a connection whose errors are taken note of.
type sqliteConn struct {
	*sqlite3.SQLiteConn
	pool *sqlitePool
	// cannotWrite: the file could not be opened to be written when the connection was made.
	cannotWrite bool
	// wrote: the transaction has changed something.
	wrote bool
}

var (
	_ driver.ExecerContext      = (*sqliteConn)(nil)
	_ driver.QueryerContext     = (*sqliteConn)(nil)
	_ driver.ConnPrepareContext = (*sqliteConn)(nil)
	_ driver.ConnBeginTx        = (*sqliteConn)(nil)
	_ driver.Validator          = (*sqliteConn)(nil)
)

// IsValid implements [driver.Validator].
func (c *sqliteConn) IsValid() bool { return !c.cannotWrite && c.pool.damage.Load() == nil }

// Close implements [driver.Conn]. The last connection would merge the log into the file: not into a damaged one.
func (c *sqliteConn) Close() error {
	if c.pool.damage.Load() != nil {
		return nil
	}
	return c.SQLiteConn.Close()
}

func (c *sqliteConn) saw(err error) error {
	if failed, ok := errors.AsType[sqlite3.Error](err); ok && failed.Code == sqlite3.ErrReadonly {
		c.cannotWrite = true
	}
	return c.pool.saw(err)
}

// shut gives why nothing more is to be done with the database.
func (c *sqliteConn) shut() error {
	if damage := c.pool.damage.Load(); damage != nil {
		return damage
	}
	return nil
}

// ExecContext implements [driver.ExecerContext].
func (c *sqliteConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if err := c.shut(); err != nil {
		return nil, err
	}
	result, err := c.SQLiteConn.ExecContext(ctx, query, args)
	if err != nil {
		return nil, c.saw(err)
	}
	if changed, err := result.RowsAffected(); err == nil && changed > 0 {
		if c.wrote = true; c.AutoCommit() {
			c.pool.trouble.end()
		}
	}
	return result, nil
}

// QueryContext implements [driver.QueryerContext].
func (c *sqliteConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if err := c.shut(); err != nil {
		return nil, err
	}
	rows, err := c.SQLiteConn.QueryContext(ctx, query, args)
	if err != nil {
		return nil, c.saw(err)
	}
	if made, ok := rows.(*sqlite3.SQLiteRows); ok {
		return &sqliteRows{made, c}, nil
	}
	return rows, nil
}

// PrepareContext implements [driver.ConnPrepareContext].
func (c *sqliteConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	if err := c.shut(); err != nil {
		return nil, err
	}
	stmt, err := c.SQLiteConn.PrepareContext(ctx, query)
	return stmt, c.saw(err)
}

// BeginTx implements [driver.ConnBeginTx].
func (c *sqliteConn) BeginTx(ctx context.Context, options driver.TxOptions) (driver.Tx, error) {
	if err := c.shut(); err != nil {
		return nil, err
	}
	c.wrote = false
	tx, err := c.SQLiteConn.BeginTx(ctx, options)
	if err != nil {
		return nil, c.saw(err)
	}
	return sqliteTx{tx, c}, nil
}

// sqliteRows are the rows of a query: its errors come with them.
type sqliteRows struct {
	*sqlite3.SQLiteRows
	conn *sqliteConn
}

// Next implements [driver.Rows].
func (r *sqliteRows) Next(dest []driver.Value) error { return r.conn.saw(r.SQLiteRows.Next(dest)) }

type sqliteTx struct {
	driver.Tx
	conn *sqliteConn
}

// Commit implements [driver.Tx].
func (tx sqliteTx) Commit() error {
	if err := tx.conn.shut(); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	if err := tx.Tx.Commit(); err != nil {
		return tx.conn.saw(err)
	}
	if tx.conn.wrote {
		tx.conn.pool.trouble.end()
	}
	return nil
}
