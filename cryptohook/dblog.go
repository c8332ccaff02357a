package cryptohook

import (
	"context"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
)

// DatabaseLog logs what a database does, without the values: they are keys and messages.
func DatabaseLog(log zerolog.Logger) dbutil.DatabaseLogger {
	return databaseLog{dbutil.ZeroLogger(log.With().Str("component", "database").Logger())}
}

type databaseLog struct{ dbutil.DatabaseLogger }

func (l databaseLog) QueryTiming(ctx context.Context, method, query string, _ []any, rows int, duration time.Duration, err error) {
	l.DatabaseLogger.QueryTiming(ctx, method, query, nil, rows, duration, err)
}
