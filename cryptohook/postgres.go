package cryptohook

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"go.mau.fi/util/dbutil"
)

// connectTimeout is how long a server may take to let us in, unless the URI says something else.
const connectTimeout = 5 * time.Second

// idleInTransaction is how long the server lets one of our transactions do nothing: a process that is stopped in the middle of
// one must not keep the others out.
const idleInTransaction = ownerLease - time.Second

// Errors of opening a PostgreSQL database.
var (
	// ErrPostgresURI: the URI cannot be understood. It is not told why, since it holds a password.
	ErrPostgresURI = errors.New("it is not of the form postgres://user:password@host/database")
	// ErrNotOpened: the database was not opened by [OpenPostgres].
	ErrNotOpened = errors.New("a PostgreSQL database has to be opened by cryptohook.OpenPostgres")
)

// OpenPostgres opens a PostgreSQL database (14 or newer) for [Own] and [Install], by its URI or its key=value form. It does not
// connect yet. The database's pool differs from one of pgx's own, for mautrix's statements too:
//
//   - A connection serves the process that owns the database, and no other: see [Own].
//   - Text is made fit for PostgreSQL, which knows neither NUL nor invalid UTF-8: strangers send both.
//   - Times are stored as UTC: mautrix's columns have no time zone.
func OpenPostgres(uri string) (*dbutil.Database, error) {
	config, err := pgx.ParseConfig(uri)
	if err != nil {
		return nil, ErrPostgresURI // without pgx's words: they may hold the password
	}
	config.RuntimeParams["idle_in_transaction_session_timeout"] = milliseconds(idleInTransaction)
	if config.ConnectTimeout == 0 {
		config.ConnectTimeout = connectTimeout
	}
	return dbutil.NewWithDB(sql.OpenDB(&postgresPool{config: config}), dbutil.Postgres.String())
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// postgresPool makes the connections of one database. It is its own driver, by which [Own] finds it.
type postgresPool struct {
	config *pgx.ConnConfig
	// owner is the ownership that connections are made for, nil before there is one.
	owner atomic.Pointer[Ownership]
}

var (
	_ driver.Connector = (*postgresPool)(nil)
	_ driver.Driver    = (*postgresPool)(nil)
)

// poolOf gives what makes the connections of a database that [OpenPostgres] has opened.
func poolOf(db *dbutil.Database) (*postgresPool, error) {
	pool, ok := db.RawDB.Driver().(*postgresPool)
	if !ok {
		return nil, ErrNotOpened
	}
	return pool, nil
}

// Driver implements [driver.Connector].
func (p *postgresPool) Driver() driver.Driver { return p }

// Open implements [driver.Driver].
func (p *postgresPool) Open(string) (driver.Conn, error) { return p.Connect(context.Background()) }

// Connect implements [driver.Connector]. A process that owned the database and no longer does gets no connection.
func (p *postgresPool) Connect(ctx context.Context) (driver.Conn, error) {
	owner := p.owner.Load()
	made, err := stdlib.GetConnector(*p.configAs(owner.applicationName())).Connect(ctx)
	if err != nil {
		return nil, err
	}
	conn := &postgresConn{Conn: made.(*stdlib.Conn), pool: p, owner: owner}
	if err = owner.admit(ctx, conn.Conn.Conn()); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// configAs is how to connect under a name that the server shows.
func (p *postgresPool) configAs(applicationName string) *pgx.ConnConfig {
	config := p.config.Copy()
	config.RuntimeParams["application_name"] = applicationName
	return config
}

// postgresConn is a connection that was made for one owner, or for none.
type postgresConn struct {
	*stdlib.Conn
	pool  *postgresPool
	owner *Ownership
}

var (
	_ driver.NamedValueChecker = (*postgresConn)(nil)
	_ driver.SessionResetter   = (*postgresConn)(nil)
)

// ResetSession implements [driver.SessionResetter]: a connection of an earlier owner is not used again.
func (c *postgresConn) ResetSession(ctx context.Context) error {
	if c.pool.owner.Load() != c.owner {
		return driver.ErrBadConn
	}
	return c.Conn.ResetSession(ctx)
}

// CheckNamedValue implements [driver.NamedValueChecker].
func (c *postgresConn) CheckNamedValue(named *driver.NamedValue) error {
	_, isJSON := named.Value.(dbutil.JSON)
	value, err := driver.DefaultParameterConverter.ConvertValue(named.Value)
	if err != nil {
		return err
	}
	switch v := value.(type) {
	case string:
		if isJSON {
			v = withoutEscapedNUL(v)
		}
		value = withoutNUL(v)
	case int64:
		if int64(int32(v)) != v {
			// pgx itself would refuse what does not fit, in words that nobody can tell from other errors.
			value = strconv.FormatInt(v, 10)
		}
	case time.Time:
		value = v.UTC()
	}
	named.Value = value
	return nil
}

// isRefused says that PostgreSQL does not take what is in a statement, and will not the next time: a number that is out of range, a
// text that is too long for its column or its index.
// https://www.postgresql.org/docs/15/errcodes-appendix.html
func isRefused(err error) bool {
	refusal, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (strings.HasPrefix(refusal.Code, "22") || strings.HasPrefix(refusal.Code, "54"))
}

// withoutNUL puts the replacement character in the place of what PostgreSQL does not take in a text. Identifiers that differ in
// nothing else are the same to us; that none of them is valid keeps it harmless.
func withoutNUL(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\ufffd"), "\x00", "\ufffd")
}

// withoutEscapedNUL does the same to the escape \u0000 in JSON, which a jsonb column refuses.
func withoutEscapedNUL(text string) string {
	const escaped = `\u0000`
	if !strings.Contains(text, escaped) {
		return text
	}
	var written strings.Builder
	for {
		at := strings.IndexByte(text, '\\')
		if at < 0 || at+1 == len(text) {
			written.WriteString(text)
			return written.String()
		}
		length := 2
		if strings.HasPrefix(text[at:], escaped) {
			length = len(escaped)
			written.WriteString(text[:at] + `\ufffd`)
		} else {
			written.WriteString(text[:at+length])
		}
		text = text[at+length:]
	}
}
