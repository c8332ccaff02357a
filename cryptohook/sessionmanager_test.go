package cryptohook

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"maunium.net/go/mautrix/id"
)

func TestTryLockGivesOneGuardASession(t *testing.T) {
	m := NewSessionManager()
	guard := m.TryLock("a")
	if guard == nil {
		t.Fatal("no guard of a free session")
	}
	if m.TryLock("a") != nil {
		t.Error("two guards of one session")
	}
	if m.TryLock("b") == nil {
		t.Error("one session's guard locks another")
	}
	guard.Unlock()
	if m.TryLock("a") == nil {
		t.Error("no guard after the release")
	}
}

func TestASecondUnlockDoesNotReleaseAnothersGuard(t *testing.T) {
	m := NewSessionManager()
	first := m.TryLock("a")
	first.Unlock()
	second := m.TryLock("a")
	first.Unlock()
	if m.TryLock("a") != nil {
		t.Error("the old guard released the session under the new one")
	}
	second.Unlock()
	second.Unlock()
	(*SessionGuard)(nil).Unlock()
	if m.TryLock("a") == nil {
		t.Error("the session stays locked")
	}
}

func TestGuardTravelsAndIsReleasedOnErrorAndPanic(t *testing.T) {
	m := NewSessionManager()
	for _, work := range []func(){func() {}, func() { panic("work") }, runtime.Goexit} {
		guard := m.TryLock("a")
		if guard == nil {
			t.Fatal("the former work did not release the session")
		}
		var workers sync.WaitGroup
		workers.Add(1)
		go func() {
			defer workers.Done()
			defer func() { _ = recover() }()
			defer guard.Unlock()
			work()
		}()
		workers.Wait()
	}
	if len(m.locked) != 0 {
		t.Errorf("%d sessions stay locked", len(m.locked))
	}
}

func TestNoTwoHoldersAtOnce(t *testing.T) {
	m := NewSessionManager()
	sessions := []id.SessionID{"a", "b", "c"}
	var holders [3]atomic.Int32
	var taken atomic.Int32
	var workers sync.WaitGroup
	for range 8 {
		workers.Go(func() {
			for i := range 3000 {
				which := i % len(sessions)
				guard := m.TryLock(sessions[which])
				if guard == nil {
					continue
				}
				taken.Add(1)
				if holders[which].Add(1) != 1 {
					t.Error("two hold one session")
				}
				holders[which].Add(-1)
				var both sync.WaitGroup
				both.Go(guard.Unlock)
				both.Go(guard.Unlock)
				both.Wait()
			}
		})
	}
	workers.Wait()
	if taken.Load() == 0 || len(m.locked) != 0 {
		t.Errorf("%d taken, %d left", taken.Load(), len(m.locked))
	}
}
