package cryptohook

import (
	"sync"

	"maunium.net/go/mautrix/id"
)

// SessionManager holds the IDs of the Megolm sessions whose sender data is being worked out, so that two workers never
// derive the same one at once (seed: "preventing clashes").
type SessionManager struct {
	mu     sync.Mutex
	locked map[id.SessionID]struct{}
}

// NewSessionManager returns an empty SessionManager.
func NewSessionManager() *SessionManager {
	return &SessionManager{locked: make(map[id.SessionID]struct{})}
}

// TryLock gives the guard of the session, or nil when someone else holds it. It never waits.
func (m *SessionManager) TryLock(sessionID id.SessionID) *SessionGuard {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, taken := m.locked[sessionID]; taken {
		return nil
	}
	m.locked[sessionID] = struct{}{}
	return &SessionGuard{manager: m, sessionID: sessionID}
}

// SessionGuard is the right to derive one session's sender data. It travels with the work, into other goroutines too.
type SessionGuard struct {
	manager   *SessionManager
	sessionID id.SessionID
	once      sync.Once
}

// Unlock releases the session. It may be called more than once, and on a nil guard.
func (g *SessionGuard) Unlock() {
	if g == nil {
		return
	}
	g.once.Do(func() {
		g.manager.mu.Lock()
		defer g.manager.mu.Unlock()
		delete(g.manager.locked, g.sessionID)
	})
}
