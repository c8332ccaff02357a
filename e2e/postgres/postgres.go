// Package postgres starts a private PostgreSQL server for tests. It listens on a Unix socket in its own temporary directory only, and
// goes when the process does that started it, however that comes about.
package postgres

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"sendertrust/e2e/child"
)

const (
	// startPatience is how long the server may take to make its files and to answer.
	startPatience = 60 * time.Second
	// stopPatience is how long it may take to end and to delete them.
	stopPatience = 60 * time.Second
	pollInterval = 20 * time.Millisecond
	// role is who we are to the server. Everybody who can reach the socket may be; the directory keeps the others out.
	role = "sendertrust"
)

// launcher runs the server until its standard input ends, and cleans up after it.
//
//go:embed launch.sh
var launcher string

// Server is a private PostgreSQL server.
type Server struct {
	dir       string
	process   *child.Process
	databases atomic.Int64
}

// Start starts a server, and returns when it answers. It runs until [Server.Stop], or until this process ends.
func Start(ctx context.Context, projectRoot string) (*Server, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startPatience, fmt.Errorf("it did not come up within %s", startPatience))
	defer cancel()
	programs, err := child.Install(ctx, projectRoot, "postgres")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "sendertrust-postgres-")
	if err != nil {
		return nil, fmt.Errorf("failed to make a directory for PostgreSQL: %w", err)
	}
	server := &Server{dir: dir}
	if err = server.start(ctx, programs); err != nil {
		err = fmt.Errorf("failed to start PostgreSQL: %w", err)
		if server.process != nil {
			err = fmt.Errorf("%w\n%s", err, server.process.Tail())
		}
		return nil, errors.Join(err, server.Stop())
	}
	return server, nil
}

func (s *Server) start(ctx context.Context, programs string) (err error) {
	cmd := exec.Command("/bin/sh", "-c", launcher, "postgres-launcher", programs, s.dir, role)
	cmd.Dir = "/"
	// PostgreSQL refuses to run as root.
	if os.Geteuid() == 0 {
		uid, gid, err := unprivileged()
		if err != nil {
			return err
		}
		if err = os.Chown(s.dir, uid, gid); err != nil {
			return err
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	if s.process, err = child.Start(cmd, nil); err != nil {
		return err
	}
	return s.awaitAnswer(ctx, "")
}

// awaitAnswer waits until a server answers that was not started at that time, as it tells it.
func (s *Server) awaitAnswer(ctx context.Context, earlier string) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		if started, err := s.startTime(ctx); err == nil && started != earlier {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.process.Exited():
			return errors.New("it has ended")
		case <-ticker.C:
		}
	}
}

func (s *Server) startTime(ctx context.Context) (started string, err error) {
	conn, err := pgx.Connect(ctx, s.URI("postgres"))
	if err != nil {
		return "", err
	}
	err = conn.QueryRow(ctx, "SELECT pg_postmaster_start_time()::text").Scan(&started)
	return started, errors.Join(err, conn.Close(ctx))
}

// How a server ends that is restarted.
const (
	// Fast lets it write down everything first, as a service is stopped.
	Fast = "INT"
	// Immediate leaves everything as it is, as a crash does. A commit survives it if synchronous_commit is on, which is not the default here.
	Immediate = "QUIT"
)

// Restart ends the server, and all connections with it, and returns when it answers again.
func (s *Server) Restart(ctx context.Context, how string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startPatience, fmt.Errorf("it did not come up again within %s", startPatience))
	defer cancel()
	started, err := s.startTime(ctx)
	if err == nil {
		_, err = fmt.Fprintln(s.process.Stdin, how)
	}
	if err == nil {
		err = s.awaitAnswer(ctx, started)
	}
	if err != nil {
		return fmt.Errorf("failed to restart PostgreSQL: %w\n%s", err, s.process.Tail())
	}
	return nil
}

// unprivileged gives somebody who is not root and whom every Debian has.
func unprivileged() (uid, gid int, err error) {
	nobody, err := user.Lookup("nobody")
	if err != nil {
		return 0, 0, fmt.Errorf("failed to find a user to run PostgreSQL as: %w", err)
	}
	if uid, err = strconv.Atoi(nobody.Uid); err != nil {
		return 0, 0, err
	}
	gid, err = strconv.Atoi(nobody.Gid)
	return uid, gid, err
}

// URI names a database of the server.
func (s *Server) URI(database string) string { return s.URIAs(role, database) }

// URIAs names a database of the server for another role.
func (s *Server) URIAs(role, database string) string {
	query := url.Values{"host": {s.dir}}
	return fmt.Sprintf("postgres://%s@/%s?%s", url.PathEscape(role), url.PathEscape(database), query.Encode())
}

// NewDatabase makes an empty database, and gives its URI.
func (s *Server) NewDatabase(ctx context.Context) (uri string, err error) {
	return s.clone(ctx, "template1")
}

// Clone makes a copy of a database that nobody is connected to, and gives its URI.
func (s *Server) Clone(ctx context.Context, uri string) (copied string, err error) {
	config, err := pgx.ParseConfig(uri)
	if err != nil {
		return "", err
	}
	return s.clone(ctx, config.Database)
}

func (s *Server) clone(ctx context.Context, template string) (uri string, err error) {
	name := "test" + strconv.FormatInt(s.databases.Add(1), 10)
	if err = s.Exec(ctx, "postgres", fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s STRATEGY FILE_COPY", name, template)); err != nil {
		return "", fmt.Errorf("failed to make a database: %w", err)
	}
	return s.URI(name), nil
}

// empty deletes the rows of all tables but those that say which version the tables have.
const empty = `
	SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname=current_database() AND pid<>pg_backend_pid();
	DO $$
	DECLARE name TEXT;
	BEGIN
		FOR name IN SELECT tablename FROM pg_tables WHERE schemaname='public' AND tablename NOT LIKE '%version' LOOP
			EXECUTE format('DELETE FROM %I', name);
		END LOOP;
	END $$
`

// Empty leaves nothing in a database but its tables, and ends who is connected to it. It takes far less time than a new database.
func (s *Server) Empty(ctx context.Context, uri string) error {
	config, err := pgx.ParseConfig(uri)
	if err != nil {
		return err
	}
	return s.Exec(ctx, config.Database, empty)
}

// Drop deletes a database, and ends who is connected to it.
func (s *Server) Drop(ctx context.Context, uri string) error {
	config, err := pgx.ParseConfig(uri)
	if err != nil {
		return err
	}
	return s.Exec(ctx, "postgres", fmt.Sprintf("DROP DATABASE %s WITH (FORCE)", config.Database))
}

// Exec runs statements in a database of the server, as its superuser.
func (s *Server) Exec(ctx context.Context, database, statements string) error {
	conn, err := pgx.Connect(ctx, s.URI(database))
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, statements)
	return errors.Join(err, conn.Close(ctx))
}

// Stop ends the server, killing it if it takes more than a minute, and deletes its directory.
func (s *Server) Stop() error {
	var err error
	if s.process != nil {
		err = s.process.Hangup(stopPatience)
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// Dir is the server's directory: it has gone when the server has.
func (s *Server) Dir() string { return filepath.Clean(s.dir) }
