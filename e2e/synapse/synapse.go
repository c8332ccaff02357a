// Package synapse runs private homeservers for tests and the demo: real Synapse, reachable only from this machine, with
// a database that is gone afterwards.
package synapse

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"sendertrust/e2e/child"
)

// ServerName is the domain in the IDs of users and rooms.
const ServerName = "localhost"

const (
	startPatience  = 60 * time.Second
	stopPatience   = 10 * time.Second
	pollInterval   = 50 * time.Millisecond
	requestTimeout = 10 * time.Second
	// portAttempts is how often a server is started anew because something else took its port first.
	portAttempts = 5
)

// launcher is the Python program that runs Synapse and ends it when we end.
//
//go:embed homeserver.py
var launcher string

// Options say which homeserver is to run.
type Options struct {
	// ProjectRoot is the directory of the module, where e2e/setup.sh installs Synapse.
	ProjectRoot string
	// Dir takes the configuration and the database, and stays. Empty: a temporary directory, which is gone when the server stops.
	Dir string
	// ExtraYAML is configuration that is set after, and instead of, that for tests: "rc_message: {per_second: 1, burst_count: 2}".
	ExtraYAML string
	// Log gets what Synapse logs: warnings and errors. Nil: only the end is kept, for errors.
	Log io.Writer
}

// Server is a private Synapse on a free loopback port.
type Server struct {
	// URL is the base URL of the client-server API, without a slash at the end.
	URL string

	process *child.Process
	client  *http.Client
	// scratch is the directory that goes with the server; empty when it was the caller's.
	scratch string
	stop    func() error
}

// errPortTaken says that something else listens on the port that the server should have got.
var errPortTaken = errors.New("the port is taken")

// Start installs Synapse where it is not installed yet, starts it, and returns when it answers. The server runs until
// [Server.Stop], or until this process ends; the context is for the start alone.
func Start(ctx context.Context, options Options) (*Server, error) {
	installed, err := child.Install(ctx, options.ProjectRoot, "synapse")
	if err != nil {
		return nil, err
	}
	server := &Server{client: &http.Client{Timeout: requestTimeout, Transport: &http.Transport{}}}
	server.stop = sync.OnceValue(server.stopOnce)
	dir := options.Dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "sendertrust-synapse-"); err != nil {
			return nil, fmt.Errorf("failed to make a directory for Synapse: %w", err)
		}
		server.scratch = dir
	} else if dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("failed to find the directory for Synapse: %w", err)
	}
	python := filepath.Join(installed, "bin", "python")
	if err = server.start(ctx, python, dir, options); err != nil {
		return nil, errors.Join(err, server.Stop())
	}
	return server, nil
}

// start tries one free port after the other until the server has its own.
func (s *Server) start(ctx context.Context, python, dir string, options Options) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startPatience, fmt.Errorf("it did not come up within %s", startPatience))
	defer cancel()
	keyID, err := writeConfig(dir, options.ExtraYAML)
	if err != nil {
		return err
	}
	for range portAttempts {
		var port int
		if port, err = freePort(ctx); err != nil {
			return err
		}
		if err = s.startOn(ctx, port, keyID, python, dir, options.Log); !errors.Is(err, errPortTaken) {
			return err
		}
	}
	return fmt.Errorf("failed to start Synapse, %d times: %w", portAttempts, err)
}

// freePort gives a port on which nothing listens, though something else may take it before the server does.
func freePort(ctx context.Context) (int, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("failed to find a free port: %w", err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

func (s *Server) startOn(ctx context.Context, port int, keyID, python, dir string, log io.Writer) (err error) {
	if err = writeListener(dir, port); err != nil {
		return err
	}
	arguments := []string{"-c", launcher}
	for _, name := range []string{"homeserver.yaml", "listener.yaml", "extra.yaml"} {
		arguments = append(arguments, "--config-path", filepath.Join(dir, name))
	}
	cmd := exec.Command(python, arguments...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "SENDERTRUST_SYNAPSE_SCRATCH="+s.scratch, "PYTHONUNBUFFERED=1")
	if s.process, err = child.Start(cmd, log); err != nil {
		return err
	}
	s.URL = fmt.Sprintf("http://127.0.0.1:%d", port)
	if err = s.awaitReady(ctx, keyID); err == nil {
		return nil
	}
	stopErr := s.process.Stop(stopPatience)
	if strings.Contains(s.process.Tail(), "Address already in use") {
		return errPortTaken
	}
	return errors.Join(fmt.Errorf("failed to start Synapse: %w\n%s", err, s.process.Tail()), stopErr)
}

// awaitReady waits until the server answers, and as the one that has our signing key.
func (s *Server) awaitReady(ctx context.Context, keyID string) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.process.Exited():
			return errors.New("it has ended")
		case <-ticker.C:
		}
		var keys struct {
			VerifyKeys map[string]json.RawMessage `json:"verify_keys"`
		}
		if s.do(ctx, http.MethodGet, "/_matrix/key/v2/server", nil, &keys) != nil {
			continue
		}
		if _, ours := keys.VerifyKeys[keyID]; ours {
			return nil
		}
	}
}

// Register makes an account. It has no device until somebody logs in.
func (s *Server) Register(ctx context.Context, localpart, password string) error {
	err := s.do(ctx, http.MethodPost, "/_matrix/client/v3/register", map[string]any{
		"username": localpart, "password": password, "inhibit_login": true,
		"auth": map[string]any{"type": "m.login.dummy"},
	}, nil)
	if err != nil {
		return fmt.Errorf("failed to register %s: %w", localpart, err)
	}
	return nil
}

// do sends one request, and reads the answer into a value when there is one to take it.
func (s *Server) do(ctx context.Context, method, path string, body, answer any) error {
	encoded, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("failed to encode the request: %w", err)
	}
	request, err := http.NewRequestWithContext(ctx, method, s.URL+path, bytes.NewReader(encoded))
	if err != nil {
		return fmt.Errorf("failed to make the request: %w", err)
	}
	response, err := s.client.Do(request)
	if err != nil {
		return fmt.Errorf("the homeserver does not answer: %w", err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("failed to read the homeserver's answer: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("the homeserver says %s: %s", response.Status, content)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(content, answer)
}

// PID is the server's process ID.
func (s *Server) PID() int { return s.process.PID() }

// Stop ends the server, killing it if it takes more than ten seconds, and deletes its temporary directory. It may be called
// more than once.
func (s *Server) Stop() error { return s.stop() }

func (s *Server) stopOnce() error {
	s.client.CloseIdleConnections()
	var err error
	if s.process != nil {
		err = s.process.Stop(stopPatience)
	}
	if s.scratch != "" {
		err = errors.Join(err, os.RemoveAll(s.scratch))
	}
	return err
}
