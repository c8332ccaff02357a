package proxy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const answerBytes = 10_000

// stage is a homeserver that counts, and a proxy before it.
type stage struct {
	*Proxy
	asked atomic.Int64
	// waiting is told of each request for slow, which is answered when answer is closed.
	waiting, answer chan struct{}
}

const slow = "v3/slow"

func newStage(t *testing.T) *stage {
	t.Helper()
	s := &stage{waiting: make(chan struct{}, 1), answer: make(chan struct{})}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.URL.Path == clientAPI+slow {
			s.waiting <- struct{}{}
			<-s.answer
		}
		_ = json.NewEncoder(w).Encode(map[string]any{
			"number": s.asked.Add(1), "path": r.URL.EscapedPath(), "query": r.URL.RawQuery, "request": string(body), "big": json.Number("9007199254740993"),
			"padding": strings.Repeat("x", answerBytes),
		})
	}))
	t.Cleanup(server.Close)
	s.Proxy = must(Start(server.URL))(t)
	t.Cleanup(s.Close)
	return s
}

type reply struct {
	Number               int64
	Path, Query, Request string
	Big                  json.Number
	Invented             string
}

var errStatus = errors.New("not 200")

// ask makes a request on a connection of its own, and gives what came.
func (s *stage) ask(method, path, body string) (answer reply, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, s.URL+clientAPI+path, strings.NewReader(body))
	if err != nil {
		return answer, err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return answer, err
	}
	defer resp.Body.Close()
	read, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer, fmt.Errorf("%d bytes: %w", len(read), err)
	}
	if resp.StatusCode != http.StatusOK {
		return answer, fmt.Errorf("%w: %d %s", errStatus, resp.StatusCode, read)
	}
	return answer, json.Unmarshal(read, &answer)
}

func TestEverythingPassesAsItIs(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	answer := must(s.ask(http.MethodPut, "v3/rooms/%21a%3Ab/send/m.room.message/1%2F2?x=%2Fy", `{"a": 1}`))(t)
	want := reply{
		Number: 1, Path: clientAPI + "v3/rooms/%21a%3Ab/send/m.room.message/1%2F2", Query: "x=%2Fy", Request: `{"a": 1}`, Big: "9007199254740993",
	}
	if answer != want {
		t.Errorf("%+v, not %+v", answer, want)
	}
}

func TestConnectionIsCutWhereItIsSaid(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	used := 0
	for _, at := range []int{0, 1, 20, 150, 1000, answerBytes} {
		cut := s.OnAnswer(KeysQuery, 0, func(_ *Request, answer *Answer) bool {
			answer.Break(CutAt(at))
			return true
		})
		// The cut of before may still hit it, on a busy machine.
		for tries := 1; ; tries++ {
			got := s.bytesUntilCut(t)
			if got == at {
				break
			} else if got > at || tries == 10 {
				t.Fatalf("cut at %d: %d bytes came", at, got)
			}
		}
		cut.Remove()
		used += cut.Used()
	}
	if asked := s.asked.Load(); asked != int64(used) || asked < 6 {
		t.Errorf("the homeserver has taken %d of %d requests that were not answered", asked, used)
	}
	s.answeredAfter(t)
}

// bytesUntilCut asks, and gives how many bytes came before the connection was closed.
func (s *stage) bytesUntilCut(t *testing.T) int {
	t.Helper()
	conn := must(net.Dial("tcp", strings.TrimPrefix(s.URL, "http://")))(t)
	ok(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	_, err := io.WriteString(conn, "POST "+clientAPI+"v3/keys/query HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
	ok(t, err)
	got := must(io.ReadAll(conn))(t)
	ok(t, conn.Close())
	return len(got)
}

func TestSilenceAndReset(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	begun := time.Now()
	s.OnAnswer(Sync, 1, func(_ *Request, answer *Answer) bool {
		answer.Break(Silence(300 * time.Millisecond))
		return true
	})
	if _, err := s.ask(http.MethodGet, "v3/sync", ""); !errors.Is(err, io.EOF) || time.Since(begun) < 300*time.Millisecond {
		t.Errorf("after %v: %v", time.Since(begun), err)
	}
	cure := must(s.Poison(Reset()))(t)
	if _, err := s.ask(http.MethodGet, "v3/sync", ""); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("not reset: %v", err)
	}
	cure()
	cure = must(s.Poison(Slices(1000, 10*time.Millisecond)))(t)
	if took := s.answeredAfter(t); took < 50*time.Millisecond {
		t.Errorf("slow bytes took %v", took)
	}
	cure()
	s.answeredAfter(t)
}

// answeredAfter asks, and gives how long the answer took. What was on its way when a toxic was taken out may still be hit by it.
func (s *stage) answeredAfter(t *testing.T) time.Duration {
	t.Helper()
	for tries := 1; ; tries++ {
		begun := time.Now()
		_, err := s.ask(http.MethodGet, "v3/sync", "")
		if err == nil {
			return time.Since(begun)
		} else if tries == 10 {
			t.Fatal(err)
		}
	}
}

func TestHooksAnswerChangeKeepAndReplay(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	var kept *Answer
	keep := s.OnAnswer(Sync, 1, func(_ *Request, answer *Answer) bool {
		kept = answer.Clone()
		return true
	})
	invent := s.OnAnswer(Sync, 2, Edit(func(answer map[string]any) bool {
		answer["invented"] = "yes"
		return answer["number"] != json.Number("2")
	}))
	for number, invented := range []string{"yes", "", "yes", ""} {
		answer := must(s.ask(http.MethodGet, "v3/sync", ""))(t)
		if answer.Number != int64(number+1) || answer.Invented != invented || answer.Big != "9007199254740993" {
			t.Errorf("answer %d: %+v", number+1, answer)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ok(t, invent.Wait(ctx, 2))
	if keep.Used() != 1 || invent.Used() != 2 {
		t.Errorf("used %d and %d times", keep.Used(), invent.Used())
	}
	s.OnAnswer(Sync, 1, func(_ *Request, answer *Answer) bool {
		*answer = *kept.Clone()
		return true
	})
	if answer := must(s.ask(http.MethodGet, "v3/sync", ""))(t); answer.Number != 1 || answer.Invented != "" {
		t.Errorf("the replay is %+v", answer)
	}
	refuse := s.OnRequest(Anything, 0, func(r *Request) *Answer {
		if string(r.Body) != "refuse me" {
			return nil
		}
		return Error(http.StatusTooManyRequests, "M_LIMIT_EXCEEDED", "slow down")
	})
	asked := s.asked.Load()
	_, err := s.ask(http.MethodPost, "v3/login", "refuse me")
	if !errors.Is(err, errStatus) || !strings.Contains(err.Error(), "M_LIMIT_EXCEEDED") || s.asked.Load() != asked {
		t.Errorf("not refused: %v; the homeserver was asked %d times more", err, s.asked.Load()-asked)
	}
	must(s.ask(http.MethodPost, "v3/login", "do not"))(t)
	if refuse.Used() != 1 {
		t.Errorf("used %d times", refuse.Used())
	}
	refuse.Remove()
	must(s.ask(http.MethodPost, "v3/login", "refuse me"))(t)
}

// A /sync may wait for half a minute: what becomes of its answer is decided when that comes.
func TestHooksCountFromTheMomentTheyAreThere(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	invent := func(what string) func(*Request, *Answer) bool {
		return Edit(func(answer map[string]any) bool {
			answer["invented"] = what
			return true
		})
	}
	early := s.OnAnswer("GET "+slow, 0, invent("early"))
	answers := make(chan reply, 1)
	go func() {
		answer, _ := s.ask(http.MethodGet, slow, "")
		answers <- answer
	}()
	<-s.waiting
	late := s.OnAnswer("GET "+slow, 0, invent("late"))
	early.Remove()
	close(s.answer)
	if answer := <-answers; answer.Invented != "late" || early.Used() != 0 || late.Used() != 1 {
		t.Errorf("the answer is %q; the hooks were used %d and %d times", answer.Invented, early.Used(), late.Used())
	}
}

func TestQueryThatAHookChangesIsPassedOn(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.OnRequest(Sync, 0, func(r *Request) *Answer {
		r.URL.RawQuery = "timeout=5"
		return nil
	})
	if answer := must(s.ask(http.MethodGet, "v3/sync?timeout=30000", ""))(t); answer.Query != "timeout=5" {
		t.Errorf("the homeserver was asked for %q", answer.Query)
	}
}

func TestAnswersAreRepeated(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	repeat := s.Repeat(Sync, 2, func(answer *Answer) bool { return !strings.Contains(string(answer.Body), `"number":1,`) })
	for _, number := range []int64{1, 2, 2, 3, 3, 4} {
		if answer := must(s.ask(http.MethodGet, "v3/sync", ""))(t); answer.Number != number {
			t.Errorf("answer %d came instead of %d", answer.Number, number)
		}
	}
	if repeat.Used() != 2 {
		t.Errorf("repeated %d times", repeat.Used())
	}
}

func TestRequestsAreCounted(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	begun := time.Now()
	for range 3 {
		must(s.ask(http.MethodGet, "v3/sync", ""))(t)
	}
	must(s.ask(http.MethodPost, "v3/keys/query", ""))(t)
	for pattern, count := range map[string]int{Sync: 3, KeysQuery: 1, Anything: 4, Login: 0, "* v3/keys/*": 1} {
		if got := len(s.Seen(pattern)); got != count {
			t.Errorf("%s: %d requests, not %d", pattern, got, count)
		}
		if got := s.MostWithin(time.Hour, begun, pattern); got != count {
			t.Errorf("%s: %d within an hour, not %d", pattern, got, count)
		}
		if got := s.MostWithin(time.Hour, time.Now(), pattern); got != 0 {
			t.Errorf("%s: %d from now on", pattern, got)
		}
	}
	s.mu.Lock()
	at := func(after time.Duration) Sight { return Sight{http.MethodGet, clientAPI + "v3/sync", begun.Add(after)} }
	s.seen = []Sight{at(0), at(time.Second), at(1500 * time.Millisecond), at(2 * time.Second), at(5 * time.Second)}
	s.mu.Unlock()
	if got := s.MostWithin(time.Second, begun, Sync); got != 3 {
		t.Errorf("%d within a second, not 3", got)
	}
}

func TestDelayedAnswerIsHeldBackAlone(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.OnAnswer(Sync, 1, func(_ *Request, answer *Answer) bool {
		answer.Delay = time.Hour
		return true
	})
	conn := must(net.Dial("tcp", strings.TrimPrefix(s.URL, "http://")))(t)
	_, err := io.WriteString(conn, "GET "+clientAPI+"v3/sync HTTP/1.1\r\nHost: localhost\r\n\r\n")
	ok(t, err)
	must(s.ask(http.MethodPost, "v3/keys/query", ""))(t)
	ok(t, conn.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
	if _, err = bufio.NewReader(conn).ReadByte(); err == nil {
		t.Error("the answer was not held back")
	}
	ok(t, conn.Close())
}

func must[T any](value T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		ok(t, err)
		return value
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
