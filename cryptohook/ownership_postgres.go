package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
)

// The ownership of a PostgreSQL database is an advisory lock, held by a connection of its own. The server ends that connection, and
// with it the lock, when it has not heard from it for the time of the lease: so a process that is stopped, or cut off, loses the
// lock as one that has died does, by the server's clock and without anybody's help.
const (
	// ownerLease is how long an owner that is not heard of stays the owner.
	ownerLease = 6 * time.Second
	// beatInterval is how often the owner is heard of, and beatTimeout how long the server may take to say that it has.
	beatInterval = time.Second
	beatTimeout  = 2 * time.Second
	// standByInterval is how often somebody who stands by tries to become the owner.
	standByInterval = 250 * time.Millisecond
	// regainInterval is how often an owner tries to get the lock back whose connection was lost.
	regainInterval = 200 * time.Millisecond
	// endTimeout is how long the connections of an earlier owner may take to end.
	endTimeout = 2 * time.Second
)

const (
	// ownerLock is the advisory lock's number: "sendertr" in ASCII.
	ownerLock = 0x73656e6465727472

	tryLockQuery       = `SELECT pg_try_advisory_lock($1)`
	unlockQuery        = `SELECT pg_advisory_unlock($1)`
	setLeaseQuery      = `SELECT set_config('idle_session_timeout', $1, false)`
	ownerTableQuery    = `SELECT to_regclass('sendertrust_owner') IS NOT NULL`
	getHolderNameQuery = `SELECT holder FROM sendertrust_owner WHERE id=1`
	raiseQuery         = `
		INSERT INTO sendertrust_owner (id, generation, holder) VALUES (1, 1, $1)
		ON CONFLICT (id) DO UPDATE SET generation=sendertrust_owner.generation+1, holder=excluded.holder
		RETURNING generation
	`
	endConnectionsQuery = `
		SELECT pg_terminate_backend(pid, $1) FROM pg_stat_activity
		WHERE datname=current_database() AND application_name LIKE 'sendertrust/%' AND application_name<>$2
	`
)

// applicationName is what the server shows the connections of an owner as, or of nobody's.
func (o *Ownership) applicationName() string {
	if o == nil {
		return "sendertrust"
	}
	return fmt.Sprintf("sendertrust/%d", o.generation)
}

// ownPostgres stands by until this process has the lock, and then shuts the earlier owner out.
func ownPostgres(ctx context.Context, db *dbutil.Database) (*Ownership, error) {
	pool, err := poolOf(db)
	if err != nil {
		return nil, err
	}
	lock, err := standBy(ctx, pool)
	if err != nil {
		return nil, err
	}
	owned := newOwnership()
	// What is left of a former ownership was cut by whoever has had the database since.
	pool.owner.Store(nil)
	if err = owned.takeOver(ctx, db, lock); err != nil {
		closeNow(lock)
		return nil, err
	}
	pool.owner.Store(owned)
	log := zerolog.Ctx(ctx)
	log.Info().Int64("generation", owned.generation).Msg("This process owns the database now")
	keeping, stop := context.WithCancel(log.WithContext(context.Background()))
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		owned.keep(keeping, pool, lock)
	}()
	owned.release = func() error {
		stop()
		<-kept
		return nil
	}
	return owned, nil
}

// standBy waits for the lock, and gives the connection that holds it. A server that is away may come back; an error is what
// somebody has to mend.
func standBy(ctx context.Context, pool *postgresPool) (*pgx.Conn, error) {
	c := &candidate{pool: pool}
	for {
		got, err := c.try(ctx)
		if got {
			return c.conn, nil
		} else if err == nil || !mustBeMended(err) {
			c.tell(ctx, err)
			select {
			case <-ctx.Done():
				err = ctx.Err()
			case <-time.After(standByInterval):
				continue
			}
		}
		c.disconnect()
		return nil, err
	}
}

// candidate is somebody who stands by.
type candidate struct {
	pool *postgresPool
	conn *pgx.Conn
	// told is what the log says last, so that it says nothing twice.
	told string
}

// try asks for the lock once.
func (c *candidate) try(ctx context.Context) (got bool, err error) {
	if c.conn == nil {
		if c.conn, err = pgx.ConnectConfig(ctx, c.pool.configAs("sendertrust standing by")); err != nil {
			return false, fmt.Errorf("failed to connect to the database: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err = c.conn.QueryRow(ctx, tryLockQuery, ownerLock).Scan(&got); err != nil {
		c.disconnect()
		return false, fmt.Errorf("failed to ask for the database's lock: %w", err)
	}
	return got, nil
}

func (c *candidate) disconnect() {
	if c.conn != nil {
		closeNow(c.conn)
		c.conn = nil
	}
}

func (c *candidate) tell(ctx context.Context, err error) {
	says := "Another process owns the database: standing by until it is gone"
	if err != nil {
		says = "The database cannot be reached, trying again"
	}
	if says == c.told {
		return
	}
	c.told = says
	entry := zerolog.Ctx(ctx).Info()
	if err != nil {
		entry = zerolog.Ctx(ctx).Warn().Err(err)
	} else if holder := c.holder(ctx); holder != "" {
		entry.Str("owner", holder)
	}
	entry.Msg(says)
}

// holder gives who the owner says that it is, for people. Before the first one has made its tables it is not known.
func (c *candidate) holder(ctx context.Context) (name string) {
	var exists bool
	if err := c.conn.QueryRow(ctx, ownerTableQuery).Scan(&exists); err != nil || !exists {
		return ""
	}
	if err := c.conn.QueryRow(ctx, getHolderNameQuery).Scan(&name); err != nil {
		return ""
	}
	return name
}

// mustBeMended says that a server answers, and that trying again will not change what.
func mustBeMended(err error) bool {
	refusal, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (strings.HasPrefix(refusal.Code, "28") || refusal.Code == "3D000" || refusal.Code == "42501")
}

// takeOver makes everything that an earlier owner does from now on fail. The lease begins at its end: until then nobody has to
// wait for the tables to be made or altered.
func (o *Ownership) takeOver(ctx context.Context, db *dbutil.Database, lock *pgx.Conn) error {
	if err := newStore(db, nil).Upgrade(ctx); err != nil {
		return fmt.Errorf("failed to upgrade the sender data: %w", err)
	}
	// One that was stopped within a transaction would have us wait for it.
	endConnections(ctx, lock, "")
	if err := lock.QueryRow(ctx, raiseQuery, processName()).Scan(&o.generation); err != nil {
		return fmt.Errorf("failed to note who owns the database: %w", err)
	}
	endConnections(ctx, lock, o.applicationName())
	return setLease(ctx, lock)
}

func setLease(ctx context.Context, lock *pgx.Conn) error {
	if _, err := lock.Exec(ctx, setLeaseQuery, milliseconds(ownerLease)); err != nil {
		return fmt.Errorf("failed to set the lease of the database's lock (PostgreSQL 14 or newer has it): %w", err)
	}
	return nil
}

// endConnections ends the connections of other owners. Where the server does not let us, since they are another role's, every unit
// of work of theirs is refused all the same.
func endConnections(ctx context.Context, lock *pgx.Conn, but string) {
	if _, err := lock.Exec(ctx, endConnectionsQuery, endTimeout.Milliseconds(), but); err != nil {
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Failed to end the connections of the former owner of the database; use one role for all that stand by")
	}
}

// processName is for people.
func processName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "?"
	}
	return fmt.Sprintf("process %d on %s", os.Getpid(), host)
}

// keep lets the server hear of us until the context ends, and gives the lock up then.
func (o *Ownership) keep(ctx context.Context, pool *postgresPool, lock *pgx.Conn) {
	for {
		err := beat(ctx, lock)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			unlock(lock)
			return
		}
		closeNow(lock)
		zerolog.Ctx(ctx).Warn().Err(err).Msg("The connection that owns the database was lost")
		if lock, err = o.regain(ctx, pool); err != nil {
			if ctx.Err() == nil {
				zerolog.Ctx(ctx).Warn().Err(o.lose(err)).Msg("This process no longer owns the database")
			}
			return
		}
		zerolog.Ctx(ctx).Info().Msg("This process owns the database again, and nobody has owned it in between")
	}
}

// beat waits for the time of the next sign of life, and gives it. It notices at once when the connection ends.
func beat(ctx context.Context, lock *pgx.Conn) error {
	waiting, cancel := context.WithTimeout(ctx, beatInterval)
	defer cancel()
	if _, err := lock.WaitForNotification(waiting); err != nil && waiting.Err() == nil {
		return err
	} else if ctx.Err() != nil {
		return ctx.Err()
	}
	// An answer that is cut off would end the connection, and not release the lock at once.
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), beatTimeout)
	defer cancel()
	return lock.Ping(asking)
}

// regain gets the lock back after its connection was lost, if nobody else has had it.
func (o *Ownership) regain(ctx context.Context, pool *postgresPool) (*pgx.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, ownerLease, errors.New("the lock could not be got back in time"))
	defer cancel()
	c := &candidate{pool: pool}
	for {
		got, err := c.try(ctx)
		if err != nil && mustBeMended(err) {
			return nil, err
		}
		if c.conn != nil {
			if err = o.admit(ctx, c.conn); err == nil && got {
				err = setLease(ctx, c.conn)
			}
			if err == nil && got {
				return c.conn, nil
			}
		}
		if errors.Is(err, ErrNotOwner) {
			c.disconnect()
			return nil, err
		}
		select {
		case <-ctx.Done():
			c.disconnect()
			return nil, context.Cause(ctx)
		case <-time.After(regainInterval):
		}
	}
}

// unlock gives the lock up: the end of its connection does so only when the server notices.
func unlock(lock *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, _ = lock.Exec(ctx, unlockQuery, ownerLock)
	closeNow(lock)
}

// closeNow ends a connection, without waiting long for the server to agree.
func closeNow(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}
