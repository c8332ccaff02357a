package cryptohook

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// killPlan is what a child process gets to do: receive a story from where its database says, with an encryptor at work all the
// time, and die.
type killPlan struct {
	Story, Database, Log string
	// Point is where the child kills itself, at the Nth time that it comes there: a point of the flush, or inMessage. Without
	// one, the parent kills it when After has passed.
	Point       string
	Nth         int
	WithoutGate bool
	After       time.Duration `json:"-"`
}

// inMessage is the moment when a message's hash and ratchet are staged, and its room key is not.
const inMessage = "in a message"

var killPoints = []string{"begun", "account", "ratchets", "written", "committed", inMessage}

const killPlanVariable = "SENDERTRUST_TEST_KILL_PLAN"

func TestMain(m *testing.M) {
	plan := os.Getenv(killPlanVariable)
	if plan == "" {
		code := m.Run()
		if err := databases.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		os.Exit(code)
	}
	if err := childMain([]byte(plan)); err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
}

// logLine is one line of a child's log: what left it, or what its handlers saw.
type logLine struct {
	Sent json.RawMessage `json:",omitempty"`
	Seen *wantedEvent    `json:",omitempty"`
}

func childMain(rawPlan []byte) error {
	// The parent's end closes this pipe, whatever it died of.
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(2)
	}()
	var plan killPlan
	var s story
	if err := json.Unmarshal(rawPlan, &plan); err != nil {
		return err
	} else if err = json.Unmarshal(must(os.ReadFile(plan.Story)), &s); err != nil {
		return err
	}
	log, err := os.OpenFile(plan.Log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	// The line may be torn when the process is killed. The next process begins a new one.
	note := func(line logLine) { must(fmt.Fprintf(log, "\n%s\n", rawJSON(line))) }
	bot := &actor{
		userID: receiverUser, master: must(olm.NewPKSigningFromSeed(s.Seeds[0])),
		selfSigning: must(olm.NewPKSigningFromSeed(s.Seeds[1])), userSigning: must(olm.NewPKSigningFromSeed(s.Seeds[2])),
	}
	net := s.network()
	net.onSent = func(body []byte) { note(logLine{Sent: body}) }
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r, err := openReceiver(ctx, safeDriver, plan.Database, 0, net, bot, zerolog.Nop())
	if err != nil {
		return err
	}
	r.onEvent(func(seen wantedEvent) { note(logLine{Seen: &seen}) })
	plan.arm(r)
	fmt.Println("ready")
	var workers sync.WaitGroup
	var encryptErr error
	workers.Go(func() { encryptErr = s.encryptAllTheTime(ctx, r) })
	workers.Go(func() { r.inbox.run(ctx) })
	if err = s.feed(ctx, r); err != nil {
		return err
	}
	cancel()
	workers.Wait()
	if err = r.uow.flush(context.Background()); err != nil {
		return err
	}
	return encryptErr
}

// encryptAllTheTime writes to the peers in turn, with or without an Olm session that they have started, and shares sessions.
func (s *story) encryptAllTheTime(ctx context.Context, r *receiver) error {
	for n := 0; ctx.Err() == nil; n++ {
		to := s.Devices[n%len(s.Devices)]
		err := r.send(ctx, to, fmt.Sprintf("%d of process %d", n, os.Getpid()))
		if err == nil && n%5 == 0 {
			also := s.Devices[(n+1)%len(s.Devices)]
			err = r.mach.ShareGroupSession(ctx, id.RoomID(fmt.Sprintf("!%d-%d:test", os.Getpid(), n)), []id.UserID{to.UserID, also.UserID})
		}
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("the encryptor failed: %w", err)
		}
	}
	return nil
}

// arm has the process killed at the point of the plan.
func (plan *killPlan) arm(r *receiver) {
	r.uow.withoutGate = plan.WithoutGate
	switch plan.Point {
	case "":
	case inMessage:
		r.mach.CryptoStore = &interrupting{unitOfWork: r.uow, nth: plan.Nth, interrupt: func() {
			flushed := make(chan struct{})
			go func() {
				_ = r.uow.flush(context.Background())
				close(flushed)
			}()
			if plan.WithoutGate {
				<-flushed
			}
			die()
		}}
	default:
		times := 0
		r.uow.fault = func(at string) error {
			if at == plan.Point {
				if times++; times == plan.Nth {
					die()
				}
			}
			return nil
		}
	}
}

func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// interrupting is the store of a machine that is interrupted in the middle of the nth message that it receives.
type interrupting struct {
	*unitOfWork
	nth, count int
	interrupt  func()
}

func (i *interrupting) UpdateSession(ctx context.Context, senderKey id.SenderKey, session *crypto.OlmSession) error {
	err := i.unitOfWork.UpdateSession(ctx, senderKey, session)
	i.staged(ctx)
	return err
}

func (i *interrupting) AddSession(ctx context.Context, senderKey id.SenderKey, session *crypto.OlmSession) error {
	err := i.unitOfWork.AddSession(ctx, senderKey, session)
	i.staged(ctx)
	return err
}

func (i *interrupting) staged(ctx context.Context) {
	if isReceiving(ctx) {
		if i.count++; i.count == i.nth {
			i.interrupt()
		}
	}
}

// killing feeds child processes with a story, one after the other on the same database.
type killing struct {
	t     *testing.T
	story *story
	file  string
	// killed, completed and sent count over all trials.
	killed, completed, sent int
}

func newKilling(t *testing.T) *killing {
	t.Helper()
	k := &killing{t: t, story: newStory(t, newDatabase(t), 20)}
	k.story.tellAll(30)
	k.file = filepath.Join(t.TempDir(), "story.json")
	if err := os.WriteFile(k.file, rawJSON(k.story), 0o600); err != nil {
		t.Fatal(err)
	}
	return k
}

// tellAll tells a story in which new peers come forth over time, and old ones start new Olm sessions.
func (s *story) tellAll(syncs int) {
	const each = 10
	random := rand.New(rand.NewPCG(1, 2))
	for i := range syncs {
		known := s.peers[:min(i+1, len(s.peers))]
		if again := i - len(s.peers); again >= 0 {
			s.peers[again].olm = nil
		}
		from := []*peer{known[len(known)-1]}
		for len(from) < each {
			from = append(from, known[random.IntN(len(known))])
		}
		s.tell(from...)
	}
}

// trial feeds children on a fresh copy of the database by the plans that next gives, until one completes. It gives what was
// wrong in the end.
func (k *killing) trial(next func() killPlan) error {
	database, log := copyDatabase(k.t, k.story.seed), filepath.Join(k.t.TempDir(), "log")
	for {
		plan := next()
		plan.Story, plan.Database, plan.Log = k.file, database, log
		if k.child(plan) {
			k.killed++
			continue
		}
		k.completed++
		return k.verify(database, log)
	}
}

// child runs one child process and says whether it was killed. It must end in no other way but complete.
func (k *killing) child(plan killPlan) (killed bool) {
	k.t.Helper()
	cmd := exec.Command(must(os.Executable()))
	cmd.Env = append(os.Environ(), killPlanVariable+"="+string(rawJSON(plan)))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, stdout := must(cmd.StdinPipe()), must(cmd.StdoutPipe())
	defer stdin.Close()
	if err := cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err == nil && strings.TrimSpace(line) == "ready" && plan.After > 0 {
		timer := time.AfterFunc(plan.After, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
	}
	// A child that hangs shows where.
	stalled := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Signal(syscall.SIGQUIT) })
	defer stalled.Stop()
	if err = cmd.Wait(); err == nil {
		return false
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		k.t.Fatalf("a child process ended by itself: %v\n%s", err, stderr.Bytes())
	}
	return true
}

// verify opens the database, has the rest handled, and checks everything: what was stored, what handlers saw, what was sent, and
// that both sides can go on.
func (k *killing) verify(database, log string) error {
	ctx := k.t.Context()
	net := k.story.network()
	r := k.story.openWith(k.t, safeDriver, database, 0, net)
	defer r.close()
	file := must(os.Open(log))
	defer file.Close()
	readers, err := k.story.readers(ctx)
	if err != nil {
		return err
	}
	var seen []wantedEvent
	lines, torn := bufio.NewScanner(file), 0
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line logLine
		if len(lines.Bytes()) == 0 {
			continue
		} else if err = json.Unmarshal(lines.Bytes(), &line); err != nil {
			torn++
			continue
		}
		if line.Seen != nil {
			seen = append(seen, *line.Seen)
			continue
		}
		if _, err = read(ctx, readers, line.Sent); err != nil {
			return fmt.Errorf("message %d: %w", k.sent, err)
		}
		k.sent++
	}
	if err = lines.Err(); err != nil || torn > k.killed {
		return fmt.Errorf("the log has %d torn lines: %w", torn, err)
	}
	r.onEvent(func(event wantedEvent) { seen = append(seen, event) })
	handleErr := r.handleAll(ctx)
	return errors.Join(handleErr, k.story.check(ctx, r), k.story.checkHandled(seen), k.story.goOn(ctx, r, net, readers))
}

// goOn has both sides write to each other once more.
func (s *story) goOn(ctx context.Context, r *receiver, net *network, readers map[id.UserID]*peer) error {
	var arrived []string
	var readErr error
	net.onSent = func(body []byte) {
		texts, err := read(ctx, readers, body)
		arrived, readErr = append(arrived, texts...), errors.Join(readErr, err)
	}
	var answers []object
	var keys []*megolm
	for _, p := range s.peers {
		if err := r.send(ctx, p.device(), "still there?"); err != nil {
			return err
		}
		reader := readers[p.owner.userID]
		reader.olm = must(reader.mach.CryptoStore.GetLatestSession(ctx, s.receiver.IdentityKey())).Internal
		key := newMegolm(storyRoom)
		answers, keys = append(answers, s.encrypt(reader, "m.room_key", key.roomKey())), append(keys, key)
	}
	if readErr != nil {
		return readErr
	} else if len(arrived) != len(s.peers) {
		return fmt.Errorf("%d messages arrived of %d", len(arrived), len(s.peers))
	}
	if err := r.process(ctx, s.sync(answers, nil)); err != nil {
		return err
	}
	for _, key := range keys {
		if stored, err := r.uow.GetGroupSession(ctx, storyRoom, key.id()); err != nil || stored == nil {
			return fmt.Errorf("an answer is LOST (error %v)", err)
		}
	}
	return nil
}

// TestKilledAtAnyMomentNothingIsLost is the proof of the unit of work: whenever the process dies, redelivery completes what it
// had begun, exactly once, and no ratchet state is used twice.
func TestKilledAtAnyMomentNothingIsLost(t *testing.T) {
	kills := 100
	if testing.Short() {
		kills = 10
	}
	k := newKilling(t)
	begun, trials, at := time.Now(), 0, make(map[string]int)
	for k.killed < kills {
		trials++
		err := k.trial(func() killPlan {
			switch {
			case k.killed == kills:
				return killPlan{}
			case k.killed%2 == 0:
				at["random"]++
				return killPlan{After: time.Duration(rand.Int64N(int64(100 * time.Millisecond)))}
			default:
				point := killPoints[k.killed/2%len(killPoints)]
				at[point]++
				return killPlan{Point: point, Nth: 1 + rand.IntN(8)}
			}
		})
		if err != nil {
			t.Fatalf("after %d kills: %v", k.killed, err)
		}
	}
	t.Logf("%d kills in %d trials, %d messages of the receiver read, in %v; planned %v", k.killed, trials, k.sent, time.Since(begun).Round(time.Millisecond), at)
}

// TestWithoutTheGateKeysAreLost shows that the test above can fail: without the gate, a flush in the middle of a message commits
// its hash without its key, and redelivery is refused.
func TestWithoutTheGateKeysAreLost(t *testing.T) {
	k := newKilling(t)
	const kills = 5
	err := k.trial(func() killPlan {
		plan := killPlan{WithoutGate: true, Point: inMessage, Nth: 3}
		if k.killed == kills {
			plan.Point = ""
		}
		return plan
	})
	if err == nil {
		t.Fatal("nothing was lost")
	}
	lost := strings.Count(err.Error(), "LOST")
	if lost == 0 {
		t.Fatalf("no key was lost, but: %v", err)
	}
	t.Logf("%d kills without the gate: %d room keys lost", k.killed, lost)
}
