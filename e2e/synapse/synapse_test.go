package synapse

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sendertrust/e2e/child"
)

const (
	projectRoot = "../.."
	password    = "correct horse battery staple"
	patience    = 3 * time.Minute
)

// helperDirectory names the environment variable that makes the test binary a process that starts a server and does not stop it.
const helperDirectory = "SENDERTRUST_TEST_START_SYNAPSE"

func TestMain(m *testing.M) {
	if os.Getenv(helperDirectory) == "" {
		os.Exit(m.Run())
	}
	server, err := Start(context.Background(), Options{ProjectRoot: projectRoot})
	if err != nil {
		panic(err)
	}
	if err = json.NewEncoder(os.Stdout).Encode([]string{strconv.Itoa(server.PID()), server.scratch}); err != nil {
		panic(err)
	}
	select {}
}

func start(t *testing.T, options Options) *Server {
	t.Helper()
	if testing.Short() {
		t.Skip("runs a homeserver")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	options.ProjectRoot = projectRoot
	begin := time.Now()
	server, err := Start(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s was up after %s", server.URL, time.Since(begin).Round(time.Millisecond))
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

// logIn gives the user ID that the server returns at a login by password, or the error code.
func logIn(t *testing.T, server *Server, user string) (userID, errorCode string) {
	t.Helper()
	body, err := json.Marshal(map[string]any{
		"type": "m.login.password", "password": password,
		"identifier": map[string]any{"type": "m.id.user", "user": user},
	})
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.Post(server.URL+"/_matrix/client/v3/login", "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var answer struct {
		UserID  string `json:"user_id"`
		ErrCode string `json:"errcode"`
	}
	if err = json.NewDecoder(response.Body).Decode(&answer); err != nil {
		t.Fatal(err)
	}
	return answer.UserID, answer.ErrCode
}

// gone says whether a process has ended. One that nobody has waited for yet (Z) has.
func gone(pid int) bool {
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	return os.IsNotExist(err) || errors.Is(err, syscall.ESRCH) || bytes.Contains(status, []byte("State:\tZ"))
}

func TestServersRunSideBySideAndKnowOnlyTheirOwnUsers(t *testing.T) {
	first, second := start(t, Options{}), start(t, Options{})
	for server, name := range map[*Server]string{first: "alice", second: "bob"} {
		if err := server.Register(t.Context(), name, password); err != nil {
			t.Fatal(err)
		}
		if err := server.Register(t.Context(), name, password); err == nil || !strings.Contains(err.Error(), "M_USER_IN_USE") {
			t.Errorf("a second registration of %s: %v", name, err)
		}
	}
	for range 20 {
		if userID, code := logIn(t, first, "alice"); userID != "@alice:"+ServerName {
			t.Fatalf("alice logs in as %q, with error %q", userID, code)
		}
	}
	if userID, code := logIn(t, second, "alice"); code != "M_FORBIDDEN" {
		t.Errorf("alice logs in to the other server as %q, with error %q", userID, code)
	}
}

func TestStoppedServerLeavesNothingBehind(t *testing.T) {
	server := start(t, Options{})
	begin := time.Now()
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Logf("stopped within %s", time.Since(begin).Round(time.Millisecond))
	if !gone(server.PID()) {
		t.Errorf("process %d is still there", server.PID())
	}
	if _, err := os.Stat(server.scratch); !os.IsNotExist(err) {
		t.Errorf("the directory %s is still there: %v", server.scratch, err)
	}
	if err := server.Stop(); err != nil {
		t.Errorf("stopping it again: %v", err)
	}
}

func TestServerKeepsTheCallersDirectory(t *testing.T) {
	dir := t.TempDir()
	server := start(t, Options{Dir: dir})
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "homeserver.db")); err != nil {
		t.Error(err)
	}
}

func TestServerListensOnLoopbackOnly(t *testing.T) {
	server := start(t, Options{})
	port := server.URL[strings.LastIndex(server.URL, ":")+1:]
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range addresses {
		network, ok := address.(*net.IPNet)
		if !ok || network.IP.IsLoopback() {
			continue
		}
		// That the address is free on this machine's other interfaces says that nothing listens there.
		listener, err := net.Listen("tcp", net.JoinHostPort(network.IP.String(), port))
		if errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("something listens on %s, port %s", network.IP, port)
		} else if err == nil {
			listener.Close()
		}
	}
}

func TestExtraConfigurationReplacesThatForTests(t *testing.T) {
	server := start(t, Options{ExtraYAML: "rc_login: {account: {per_second: 0.01, burst_count: 2}}"})
	if err := server.Register(t.Context(), "alice", password); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if userID, code := logIn(t, server, "alice"); userID == "" {
			t.Fatal(code)
		}
	}
	if _, code := logIn(t, server, "alice"); code != "M_LIMIT_EXCEEDED" {
		t.Errorf("the third login has the error %q", code)
	}
}

func TestTakenPortIsRecognised(t *testing.T) {
	other := start(t, Options{})
	dir := t.TempDir()
	keyID, err := writeConfig(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(other.URL[strings.LastIndex(other.URL, ":")+1:])
	if err != nil {
		t.Fatal(err)
	}
	server := &Server{client: other.client}
	installed, err := child.Install(t.Context(), projectRoot, "synapse")
	if err != nil {
		t.Fatal(err)
	}
	python := filepath.Join(installed, "bin", "python")
	if err = server.startOn(t.Context(), port, keyID, python, dir, nil); !errors.Is(err, errPortTaken) {
		t.Errorf("a server on the port of another starts with: %v", err)
	}
	if !gone(server.PID()) {
		t.Errorf("process %d is still there", server.PID())
	}
}

func TestServerThatCannotStartSaysWhy(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a homeserver")
	}
	_, err := Start(t.Context(), Options{ProjectRoot: projectRoot, ExtraYAML: "database: {name: oracle}"})
	if err == nil || !strings.Contains(err.Error(), "oracle") {
		t.Errorf("an impossible database: %v", err)
	}
}

func TestServerEndsWithItsParentEvenIfThatIsKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a homeserver")
	}
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	parent := exec.CommandContext(ctx, executable)
	parent.Env = append(os.Environ(), helperDirectory+"=1")
	parent.Stderr = os.Stderr
	output, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = parent.Start(); err != nil {
		t.Fatal(err)
	}
	var started []string
	decodeErr := json.NewDecoder(output).Decode(&started)
	if err = parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, output)
	_ = parent.Wait()
	if decodeErr != nil {
		t.Fatal(decodeErr)
	}
	pid, err := strconv.Atoi(started[0])
	if err != nil {
		t.Fatal(err)
	}
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for !gone(pid) {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			t.Fatalf("process %d has outlived its parent", pid)
		}
	}
	if _, err = os.Stat(started[1]); !os.IsNotExist(err) {
		t.Errorf("the directory %s has outlived the parent: %v", started[1], err)
	}
}
