package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/jackc/pgx/v5"
	"go.mau.fi/util/dbutil"
)

// ErrNotOwner says that this process does not own the database, or no longer does.
var ErrNotOwner = errors.New("another process owns the database")

// Ownership is one process's right to a database, to be the only one that works with it. It is got by [Own].
type Ownership struct {
	// generation counts the owners of a PostgreSQL database: what an earlier one writes is refused.
	generation int64
	release    func() error
	releasing  sync.Once
	// filled, if set, notes that the database has got its tables; after the first write.
	filled  func()
	filling sync.Once
	// losing ends, with its cause, when the database is lost.
	losing context.Context
	end    context.CancelCauseFunc
}

func newOwnership() *Ownership {
	losing, end := context.WithCancelCause(context.Background())
	return &Ownership{losing: losing, end: end, release: func() error { return nil }}
}

// Own makes this process the owner of the database; one process at a time is.
//
// A database in SQLite that another process owns gives a [DatabaseInUseError]; one in memory has no other. For PostgreSQL, Own stands
// by until the owner is gone, which it tells in the context's log: it has released the database, has died, or was not heard of for
// some seconds. When Own returns, the tables of this package are up to date, and whoever owned the database before cannot write to
// it any more, even if it comes back.
//
// Log in only when you own the database, and read nothing from it before.
func Own(ctx context.Context, db *dbutil.Database) (*Ownership, error) {
	switch db.Dialect {
	case dbutil.SQLite:
		return ownFile(ctx, db)
	case dbutil.Postgres:
		return ownPostgres(ctx, db)
	default:
		return nil, dbutil.ErrUnsupportedDialect
	}
}

// Lost is closed when the process no longer owns the database, or must not go on with it since it is damaged; [Ownership.Err] says why
// then. The hook stops by itself.
func (o *Ownership) Lost() <-chan struct{} { return o.losing.Done() }

// Err is nil as long as the process owns the database.
func (o *Ownership) Err() error { return context.Cause(o.losing) }

// Release gives the database to whoever stands by. It may be called more than once.
func (o *Ownership) Release() (err error) {
	o.releasing.Do(func() {
		err = o.release()
		o.lose(errors.New("it was released"))
	})
	return err
}

// lose ends the ownership, and gives the error of whoever goes on all the same.
func (o *Ownership) lose(why error) error {
	o.end(fmt.Errorf("%w: %w", ErrNotOwner, why))
	return o.Err()
}

// abandon ends the ownership of a damaged database. Unlike one that was lost it is not to be got again.
func (o *Ownership) abandon(damage *DamagedError) {
	if o != nil {
		o.end(damage)
	}
}

const (
	getGenerationQuery  = `SELECT generation FROM sendertrust_owner WHERE id=1`
	lockGenerationQuery = getGenerationQuery + ` FOR UPDATE`
)

// Write runs fn in a transaction of its own, for who has other tables in the database. A process that does not own the database any more
// gets [ErrNotOwner].
func (o *Ownership) Write(ctx context.Context, db *dbutil.Database, fn func(ctx context.Context) error) error {
	err := db.DoTxn(ctx, nil, func(ctx context.Context) error {
		if err := o.fence(ctx, db); err != nil {
			return err
		}
		return fn(ctx)
	})
	if err == nil && o != nil && o.filled != nil {
		o.filling.Do(o.filled)
	}
	return err
}

// fence begins every transaction that writes. On PostgreSQL it makes the writers come one after the other, and fails with
// [ErrNotOwner] if the database has got another owner: that one's first act waits for us, or we see it. SQLite does the first by
// itself, and a lock on its file is not lost.
func (o *Ownership) fence(ctx context.Context, db *dbutil.Database) error {
	if o == nil || db.Dialect != dbutil.Postgres {
		return nil
	}
	if err := o.Err(); err != nil {
		return err
	}
	var generation int64
	if err := db.QueryRow(ctx, lockGenerationQuery).Scan(&generation); err != nil {
		return fmt.Errorf("failed to make sure of owning the database: %w", err)
	}
	return o.check(generation)
}

// admit makes sure that a new connection is the owner's. Whoever takes over raises the generation before it looks for the
// connections of the earlier ones: so it finds this one, or this one finds the generation raised.
func (o *Ownership) admit(ctx context.Context, conn *pgx.Conn) error {
	if o == nil {
		return nil
	}
	var generation int64
	if err := conn.QueryRow(ctx, getGenerationQuery).Scan(&generation); err != nil {
		return fmt.Errorf("failed to make sure of owning the database: %w", err)
	}
	return o.check(generation)
}

func (o *Ownership) check(generation int64) error {
	if generation != o.generation {
		return o.lose(fmt.Errorf("this one was number %d, and number %d has taken over", o.generation, generation))
	}
	return o.Err()
}
